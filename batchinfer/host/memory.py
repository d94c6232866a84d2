"""Memory of this process and of the system, as Linux tells it in /proc."""

from pathlib import Path


def peak_memory_bytes() -> int:
    """The most that this process had resident; 0 where the system does not tell."""
    return _field_bytes("/proc/self/status", "VmHWM")


def available_bytes() -> int:
    """What the system can still give; 16 GiB where it does not tell."""
    return _field_bytes("/proc/meminfo", "MemAvailable") or 1 << 34


def _field_bytes(path: str, field: str) -> int:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
