"""The kernels in C for the CPU: which instruction sets they are built for, and the library of one, ready to be called.

Each instruction set has a library of its own, `cpu_NAME.so` beside this file, with the same functions; installing
batchinfer compiles them. All give the same bits (`vector_cpu.h`); what torch multiplies beside them does not. This
module loads torch only with a library.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from batchinfer.kernels import dispatch
from batchinfer.kernels.processor import has

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FOLDER = Path(__file__).parent

_NEEDED = {
    "avx2": ("avx2", "fma", "f16c"),
    "avx512bw": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    "neon": ("asimd", "asimddp"),
}
"""The words of /proc/cpuinfo without which an instruction set's library does not run, from slow to fast."""

REFERENCE = "reference"
CPU_PATHS = ("auto", REFERENCE, *_NEEDED)
OTHERS = (REFERENCE, "triton")
"""The values of `BATCHINFER_KERNELS` with which no kernel in C is called."""


def cpu_path(wanted: str = "auto") -> str:
    """Return the path that the kernels for the CPU take here: the fastest, or the one that is wanted.

    The path "reference" computes with torch's operations alone; so it does where `BATCHINFER_KERNELS` asks for that, or
    for Triton's interpreter. Raises `ValueError` for a path that is unknown, not built, or not for this processor.
    """
    if wanted not in CPU_PATHS:
        raise ValueError(f"cpu_path is {wanted!r}; it must be one of {', '.join(CPU_PATHS)}")
    if dispatch.wanted() in OTHERS:
        return REFERENCE
    if wanted == "auto":
        return next((path for path in reversed(_NEEDED) if not _missing(path)), REFERENCE)
    if wanted != REFERENCE and (missing := _missing(wanted)):
        raise ValueError(f"cpu_path is {wanted!r}, and {missing}; take {cpu_path()!r} or 'auto'")
    return wanted


def why_reference() -> str:
    """Say why no kernels in C run here, for a report of the path "reference"."""
    if (asked := dispatch.wanted()) in OTHERS:
        return f"BATCHINFER_KERNELS is {asked!r}"
    built = [path for path in _NEEDED if _file(path).exists()]
    if not built:
        return "the kernels in C are not built: install a C compiler (gcc or clang), then batchinfer again"
    return "; ".join(_missing(path) for path in built)


def _missing(path: str) -> str:
    """Say what keeps the library of a path from running here; nothing if it runs."""
    if not _file(path).exists():
        return f"{_file(path).name} is not built"
    lacking = [word for word in _NEEDED[path] if not has(word)]
    return f"this processor has no {', '.join(lacking)}" if lacking else ""


def _file(path: str) -> Path:
    return FOLDER / f"cpu_{path}.so"


@cache
def load(path: str) -> ctypes.CDLL:
    """Load the library of a path. It computes on one thread, until `use_torch_threads`."""
    library = ctypes.CDLL(str(_file(path)))
    library.packed_w8_bytes.restype = ctypes.c_int64
    library.packed_w8_bytes.argtypes = [ctypes.c_int64] * 2
    library.pack_w4.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    library.pack_w8.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    return library


def use_torch_threads(library: ctypes.CDLL) -> int:
    """Let a library compute on the threads that torch computes on; return how many there are.

    There is one if torch's OpenMP library cannot be called.
    """
    import torch

    start = next(filter(None, map(_starter, _openmp_libraries(Path(torch.__file__).parent))), None)
    threads = 1 if start is None else torch.get_num_threads()
    library.set_threads(start, threads)
    return threads


def _openmp_libraries(torch_folder: Path) -> list[str]:
    """Return the OpenMP libraries that this process has loaded with torch, torch's own first."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    loaded = dict.fromkeys(line.split(maxsplit=5)[5] for line in maps if "omp" in line and ".so" in line)
    return sorted(loaded, key=lambda file: not file.startswith(str(torch_folder)))


def _starter(library: str) -> ctypes.c_void_p | None:
    """Return the function that starts a region on an OpenMP library's threads, if it has the one that GCC calls."""
    start = getattr(ctypes.CDLL(library), "GOMP_parallel", None)
    return None if start is None else ctypes.cast(start, ctypes.c_void_p)


def address(tensor: "Tensor | None") -> int | None:
    """Return where a tensor's numbers begin; None for no tensor."""
    return None if tensor is None else tensor.data_ptr()


class Arguments(ctypes.Structure):
    """What a function of the library takes, by address. A subclass has the fields of the struct in C."""


def pointers(names: str) -> list[tuple[str, type]]:
    """Return fields of pointers of these names."""
    return [(name, ctypes.c_void_p) for name in names.split()]


def integers(names: str) -> list[tuple[str, type]]:
    """Return fields of 64-bit integers of these names."""
    return [(name, ctypes.c_int64) for name in names.split()]


def floats(names: str) -> list[tuple[str, type]]:
    """Return fields of 32-bit floating-point numbers of these names."""
    return [(name, ctypes.c_float) for name in names.split()]


@cache
def type_number(dtype: "torch.dtype") -> int:
    """Return the number of a type in `vector_cpu.h`."""
    import torch

    return (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn).index(dtype)
