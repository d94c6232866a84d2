"""Which device a job takes, found out without torch, and how much runs side by side on it by default."""

import ctypes
from importlib.metadata import version
from pathlib import Path

from batchinfer.jobs.spec import JobSpec

MAX_NUM_SEQS = {"cpu": 64, "cuda": 1024}
MAX_NUM_BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}


def device_of(spec: JobSpec) -> str:
    """`--device`; `auto` is a GPU if there is one that the installed torch was built for."""
    if spec.device != "auto":
        return spec.device
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
