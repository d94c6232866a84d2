"""Finding a job's device without importing torch, and the default size of a batch on each device."""

import ctypes
from pathlib import Path

from batchinfer.kernels.gpu import eight_bits, refuse_old

MAX_NUM_SEQS = {"cpu": 64, "cuda": 1024}
MAX_NUM_BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}
# The driver's numbers of these attributes (cuda.h, CUdevice_attribute).
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76
DEVICES = ("auto", *MAX_NUM_SEQS)


def device_of(asked: str) -> str:
    """Return the device for `--device`: "auto" means a GPU if the installed torch was built for one that is here."""
    if asked != "auto":
        return asked
    from importlib.metadata import version  # late: it is slow to load, and not every command asks

    return "cuda" if has_gpu(version("torch")) else "cpu"


def has_gpu(torch_version: str) -> bool:
    """Return whether this machine has a GPU for that build of torch.

    The end of torch's version names the build: +cpu, +rocm6.4 or +cu128. A version without an end means CUDA.
    """
    build = torch_version.partition("+")[2]
    if build.startswith("cpu"):
        return False
    if build.startswith("rocm"):
        return Path("/dev/kfd").exists()
    return cuda_devices() > 0


def cuda_devices(library: str = "libcuda.so.1") -> int:
    """Return the number of devices that the driver shows this process (see `CUDA_VISIBLE_DEVICES`).

    It is 0 without a driver.
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def refuse_old_gpu(library: str = "libcuda.so.1") -> None:
    """Raise `ValueError` if the first GPU is too old for the kernels; without a CUDA driver, do nothing."""
    capability = gpu_capability(library)
    if capability is not None:
        refuse_old(_gpu_name(library), capability)


def gpu_capability(library: str = "libcuda.so.1") -> tuple[int, int] | None:
    """Return the compute capability of the first GPU, or None if there is no CUDA driver that tells it."""
    if not cuda_devices(library):
        return None
    driver, device, found = ctypes.CDLL(library), ctypes.c_int(0), ctypes.c_int(0)
    numbers = []
    for attribute in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR):
        if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetAttribute(
            ctypes.byref(found), attribute, device
        ):
            return None
        numbers.append(found.value)
    return numbers[0], numbers[1]


def products_of(device: str) -> frozenset[str]:
    """Return the types of 8-bit rows, of int8 and fp8, that the device "cpu" or "cuda" multiplies."""
    return eight_bits(gpu_capability()) if device == "cuda" else frozenset({"int8"})


def device_name(device: str) -> str:
    """Return the name of the processor, or of the first GPU from its driver; "unknown" if it cannot be found."""
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
