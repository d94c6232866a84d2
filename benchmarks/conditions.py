"""Under which conditions a benchmark ran: what belongs beside every figure."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from batchinfer import __version__


def conditions() -> dict[str, str]:
    """Machine, versions, commit (with "-dirty" where files differ from it) and date; taken when a benchmark begins."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    here = Path(__file__).resolve().parent
    commit = subprocess.run(describe, cwd=here, capture_output=True, text=True).stdout.strip()
    return {
        "machine": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores",
        "versions": f"batchinfer {__version__}, torch {version('torch')}, Python {platform.python_version()}",
        "commit": f"commit {commit}" if commit else "not committed",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cpu() -> str:
    """The processor's name without the clock and marks that some systems add."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
