"""Which device a job takes, found out without torch, and how much runs side by side on it by default."""

import ctypes
from pathlib import Path

MAX_NUM_SEQS = {"cpu": 64, "cuda": 1024}
MAX_NUM_BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}
DEVICES = ("auto", *MAX_NUM_SEQS)


def device_of(asked: str) -> str:
    """Of `--device`; `auto` is a GPU if there is one that the installed torch was built for."""
    if asked != "auto":
        return asked
    from importlib.metadata import version  # late: it is slow to load, and not every command asks

    return "cuda" if has_gpu(version("torch")) else "cpu"


def has_gpu(torch_version: str) -> bool:
    """True if there is a device for that build of torch: its version ends in +cpu, +rocm6.4, +cu128 or not at all."""
    build = torch_version.partition("+")[2]
    if build.startswith("cpu"):
        return False
    if build.startswith("rocm"):
        return Path("/dev/kfd").exists()
    return cuda_devices() > 0


def cuda_devices(library: str = "libcuda.so.1") -> int:
    """Devices that the driver shows this process, by `CUDA_VISIBLE_DEVICES` too; 0 without a driver."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def device_name(device: str) -> str:
    """The processor's name, or the first GPU's as its driver gives it; "unknown" where nobody tells."""
    if device == "cuda":
        return _gpu_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(": ")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _gpu_name(library: str = "libcuda.so.1") -> str:
    if not cuda_devices(library):
        return "unknown"
    driver, device, name = ctypes.CDLL(library), ctypes.c_int(0), ctypes.create_string_buffer(256)
    if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetName(name, len(name), device):
        return "unknown"
    return name.value.decode(errors="replace")
