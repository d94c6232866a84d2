"""Settings of the CPU's math libraries that keep a row's bits independent of the rows beside it."""

import os
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@cache
def has(mark: str) -> bool:
    """Return whether /proc/cpuinfo contains this word, such as a vendor or a flag."""
    return CPUINFO.exists() and mark in CPUINFO.read_text().split()


def keep_bits() -> None:
    """Make MKL add in one order for any number of rows. Call it before MKL's first product, which reads the setting.

    On Intel's processors MKL takes different kernels for few rows and for many. Its strict mode ends that, at no cost
    to products (docs/log.md). On other processors MKL has no such choice, and strict mode would be much slower.
    """
    if has("GenuineIntel"):
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def least_rows_in_bfloat16() -> int:
    """Return the fewest rows of a bfloat16 product. With fewer, oneDNN's AMX kernels add in another order.

    The number was measured with the sizes of output heads.
    """
    return 64 if has("amx_bf16") else 1
