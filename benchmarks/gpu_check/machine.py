"""Under which conditions a stage ran: what belongs beside every figure."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def conditions(smoke: bool) -> dict[str, str]:
    """Device, driver, versions, commit and date; "unknown" for what this machine cannot tell."""
    import torch

    import batchinfer

    device = "cpu, Triton's interpreter: a smoke test, whose figures mean nothing"
    if not smoke:
        found = torch.cuda.get_device_properties(0)
        device = f"{found.name}, {found.multi_processor_count} multiprocessors, {found.total_memory / 1e9:.1f} GB"
    return {
        "device": device,
        "driver": "none" if smoke else _driver(),
        "CUDA": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "batchinfer": batchinfer.__version__,
        "commit": _output("git", "describe", "--always", "--dirty", "--exclude=*"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _driver() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].split()
        return next(word for word in words if word[0].isdigit() and "." in word)
    except (OSError, IndexError, StopIteration):
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if lines and done.returncode == 0 else "unknown"
