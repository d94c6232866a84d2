"""What libraries do on this processor that decides whether a row's bits depend on the rows beside it."""

import os
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@cache
def has(mark: str) -> bool:
    """Whether the system's description of the processor has this word, such as a vendor or a flag."""
    return CPUINFO.exists() and mark in CPUINFO.read_text().split()


def keep_bits() -> None:
    """Have MKL add in one order for any number of rows, where it can. It asks before its first product, once.

    On processors of its own maker it takes other kernels for few rows and for many; its strict mode ends that, and
    costs products nothing (docs/log.md). Elsewhere it does not, and that mode would take much slower ones.
    """
    if has("GenuineIntel"):
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def least_rows_in_bfloat16() -> int:
    """Below this many, oneDNN's products of bfloat16 by AMX add in another order: measured for the sizes of heads."""
    return 64 if has("amx_bf16") else 1
