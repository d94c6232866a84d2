"""What libraries do on this processor that decides whether a row's bits depend on the rows beside it."""

import ctypes
import os
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_STRICT = 0x10000  # MKL_CBWR_STRICT, a bit of what MKL says of all its settings (mkl_types.h)
_ALL = -1  # MKL_CBWR_ALL


@cache
def has(mark: str) -> bool:
    """Whether the system's description of the processor has this word, such as a vendor or a flag."""
    return CPUINFO.exists() and mark in CPUINFO.read_text().split()


def ask_for_strict_mode() -> None:
    """Have MKL add in one order for any number of rows, where it can: it reads that before its first product, once.

    On processors of its own maker it takes other kernels for few rows and for many; its strict mode ends that, and
    costs products nothing (docs/log.md). Elsewhere it does not, and that mode would take much slower ones.
    """
    if has("GenuineIntel"):
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def bits_are_kept() -> bool:
    """Whether products of floating-point rows have the same bits for any number of rows in this process.

    MKL is asked itself, where it needs its strict mode for that; once it has answered, its mode is fixed.
    """
    import torch

    if not has("GenuineIntel") or not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return True
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    mode = getattr(library, "mkl_serv_cbwr_get", None)
    if mode is None:  # a torch whose MKL does not tell
        return "STRICT" in os.environ.get("MKL_CBWR", "")
    return bool(mode(_ALL) & _STRICT)


def least_rows_in_bfloat16() -> int:
    """Below this many, oneDNN's products of bfloat16 by AMX add in another order: measured for the sizes of heads."""
    return 64 if has("amx_bf16") else 1
