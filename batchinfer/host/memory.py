"""Memory of this process and of the system, from Linux's /proc."""

from pathlib import Path


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process so far; 0 if the system does not say."""
    return _field_bytes("/proc/self/status", "VmHWM")


def available_bytes() -> int:
    """Return the memory that the system still has available; 16 GiB if it does not say."""
    return _field_bytes("/proc/meminfo", "MemAvailable") or 1 << 34


def _field_bytes(path: str, field: str) -> int:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
