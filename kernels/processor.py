"""What the CPU's math libraries do with a product: in which types they are fast, and when a row's bits are kept."""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CPUINFO = Path("/proc/cpuinfo")
_STRICT = 0x10000  # MKL_CBWR_STRICT, a bit of what MKL says of all its settings (mkl_types.h)
_ALL = -1  # MKL_CBWR_ALL


@cache
def has(mark: str) -> bool:
    """Return whether /proc/cpuinfo contains this word, such as a vendor or a flag."""
    return CPUINFO.exists() and mark in CPUINFO.read_text().split()


def ask_for_strict_mode() -> None:
    """Make MKL add in one order for any number of rows. Call it before MKL's first product, which reads the setting.

    On Intel's processors MKL takes different kernels for few rows and for many. Its strict mode ends that, at no cost
    to products (docs/log.md). On other processors MKL has no such choice, and strict mode would be much slower.
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


@cache
def multiplied_in(dtype: "torch.dtype") -> "torch.dtype":
    """Return the type in which to multiply numbers of this type: float32 where torch has no fast product of them.

    Its products of bfloat16 need AVX-512 (or ARM's instructions for it), those of float16 AVX-512 FP16. Otherwise torch
    converts number by number, at an eighth of the speed of float32.
    """
    import torch

    fast = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if dtype not in fast or fast[dtype]() else torch.float32


def least_rows_in_bfloat16() -> int:
    """Return the fewest rows of a bfloat16 product. With fewer, oneDNN's AMX kernels add in another order.

    The number was measured with the sizes of output heads.
    """
    return 64 if has("amx_bf16") else 1
