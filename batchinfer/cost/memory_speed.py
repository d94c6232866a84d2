"""`MemorySpeed`: the speed of a device's memory and the size of its last-level cache, both measured.

The cache size must be measured, because a virtual machine reports the cache of its whole host and has only a part of
it. The seconds of a byte from memory must be measured apart, because the small models that steps are timed on fit in
that cache. So matrix products are timed on more and more weights, until these exceed the cache.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from batchinfer.cost.step_cost import PRODUCTS, Floats, Products
from batchinfer.engine.ceilings import measure_copies
from batchinfer.host.memory import available_bytes
from batchinfer.kernels.backend_compiled import CompiledBackend
from batchinfer.kernels.backends import choose_backend
from batchinfer.kernels.product import Product
from batchinfer.kernels.rows import Rows

SIDE = 2048  # rows and columns of a matrix of 4 to 16 MB, which most last-level caches hold
ROWS = 32  # rows that the seconds of a byte from memory are timed with: between a step of a few rows and one of many
LARGEST = 1 << 30  # bytes of weights, more than any last-level cache holds
ROUNDS = 4  # in which all passes are timed, one after the other: what slows the device for a while slows all alike
SHOW_THE_CACHE = ("float32", "w8a8-int8")  # products that wait for weights rather than for sums, with few rows
COPY_BYTES = 1 << 28  # copied to measure the copy rate

Curve = tuple[Floats, Floats]
"""(bytes of weights, in growing order; seconds that a byte of that many takes), [n] each."""


@dataclass(frozen=True)
class MemorySpeed:
    """The speed of one device's memory."""

    bytes_per_second: float  # copy rate; read and written bytes both count
    cache_bytes: float  # with this many bytes of weights, half of them come from memory in every step
    byte_seconds: dict[str, float]  # by name in `PRODUCTS`: extra seconds of a byte of weights from memory


def measure_memory(device: str, path: str = "auto") -> MemorySpeed:
    """Measure the memory of `device`, "cpu" or "cuda"; takes some tens of seconds on two cores.

    On a CPU, products are those of the kernels of this `path`.

    The cache size of a GPU comes from its driver. Its `byte_seconds` are 0, because the models that steps are timed on
    exceed its cache, so that step times include reads from memory.
    """
    if device == "cuda":
        cache_bytes = float(torch.cuda.get_device_properties(0).L2_cache_size)
        return MemorySpeed(measure_copies(torch.device(device), COPY_BYTES), cache_bytes, dict.fromkeys(PRODUCTS, 0.0))
    curves, byte_seconds = list[Curve](), dict[str, float]()
    for name, kind in PRODUCTS.items():
        matrices = _Matrices(kind, path, min(LARGEST, available_bytes() // 4))
        byte_seconds[name] = _extra_seconds(matrices)
        if name in SHOW_THE_CACHE:
            curves.append(_curve(matrices))
    return MemorySpeed(measure_copies(torch.device(device), COPY_BYTES), last_cache(curves), byte_seconds)


def last_cache(curves: Sequence[Curve]) -> float:
    """Return the bytes of the last-level cache, from a curve for each kind of products.

    It comes from the kind whose products slow down most beyond the cache, because it shows the edge best.
    """
    nbytes, seconds = max(curves, key=lambda curve: float(curve[1][-1] / curve[1][0]))
    halfway = (seconds[0] + seconds[-1]) / 2
    return float(np.exp2(np.interp(halfway, np.maximum.accumulate(seconds), np.log2(nbytes))))


class _Matrices:
    """Products with matrices of SIDE by SIDE, a power of two of them, of `largest` bytes in all at most."""

    def __init__(self, kind: Products, path: str, largest: int) -> None:
        self._kind, self._backend = kind, choose_backend("cpu", True, path)
        self.nbytes = int(SIDE * SIDE * kind.layer_bytes)  # of a matrix
        count = 1 << max(1, (largest // self.nbytes).bit_length() - 1)
        self.products = [self._product() for _ in range(count)]

    def rows(self, count: int) -> Rows:
        x = torch.ones(count, SIDE, dtype=getattr(torch, self._kind.dtype))
        return self._backend.rows(x, self.products[0].takes)

    def _product(self) -> Product:
        quantization, backend = self._kind.quantization, self._backend
        if quantization == "none":
            return backend.linear(torch.ones(SIDE, SIDE, dtype=getattr(torch, self._kind.dtype)))
        weight = torch.ones(SIDE, SIDE, dtype=torch.int8)
        if quantization == "w4a8" and isinstance(backend, CompiledBackend):
            scale = torch.ones(SIDE, SIDE // 128)
            return backend.linear_w4a8(weight, scale, torch.zeros_like(scale), None)
        return backend.linear_w8a8(weight, torch.ones(SIDE))


def _curve(matrices: _Matrices) -> Curve:
    """Time passes over one matrix, two, four and so on, with the fewest rows that a product takes."""
    products = matrices.products
    rows = matrices.rows(products[0].row_grain)
    counts = [1 << i for i in range(len(products).bit_length())]
    rounds = [[_second_pass(products[:count], rows) / count for count in counts] for _ in range(ROUNDS)]
    return np.array(counts) * float(matrices.nbytes), np.min(rounds, 0) / matrices.nbytes


def _extra_seconds(matrices: _Matrices) -> float:
    """Return how many seconds more a byte of weights takes from memory than from the cache, with ROWS rows."""
    products, rows = matrices.products, matrices.rows(ROWS)
    _seconds(products, rows)  # oneDNN makes its kernels
    in_cache = [products[0]] * len(products)
    extra = np.median([_seconds(products, rows) - _seconds(in_cache, rows) for _ in range(ROUNDS)])
    return max(0.0, float(extra) / (len(products) * matrices.nbytes))


def _second_pass(products: list[Product], rows: Rows) -> float:
    """Return the seconds of a pass when the last one has left in the cache what fits."""
    _seconds(products, rows)
    return _seconds(products, rows)


def _seconds(products: list[Product], rows: Rows) -> float:
    started = time.perf_counter()
    for product in products:
        product(rows)
    return time.perf_counter() - started
