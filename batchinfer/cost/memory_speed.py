"""`MemorySpeed`: the speed of a device's memory and the size of its last-level cache, both measured.

The cache size must be measured, because a virtual machine reports the cache of its whole host and has only a part of
it. The seconds of a byte from memory must be measured apart, because the small models that steps are timed on fit in
that cache. So matrix products are timed on more and more weights, until these exceed the cache.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from batchinfer.cost.step_cost import PRODUCTS, Floats, Products
from batchinfer.host.memory import available_bytes
from batchinfer.kernels.backend_compiled import CompiledBackend
from batchinfer.kernels.backends import choose_backend

SIDE = 2048  # rows and columns of a matrix of 4 to 16 MB, which most last-level caches hold
ROWS = 32  # rows that the matrices are multiplied with: between a step of a few rows and one of many
LARGEST = 1 << 30  # bytes of weights, more than any last-level cache holds
PASSES = 4  # passes timed over each number of matrices; fewer if they take longer than PASSES_SECONDS
PASSES_SECONDS = 0.5  # of all passes together; slow processors exceed it
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
    """Measure the memory of `device`, "cpu" or "cuda"; takes about five seconds on two cores.

    On a CPU, products are those of the kernels of this `path`.

    The cache size of a GPU comes from its driver. Its `byte_seconds` are 0, because the models that steps are timed on
    exceed its cache, so that step times include reads from memory.
    """
    if device == "cuda":
        cache_bytes = float(torch.cuda.get_device_properties(0).L2_cache_size)
        return MemorySpeed(_copy_rate(device), cache_bytes, dict.fromkeys(PRODUCTS, 0.0))
    largest = min(LARGEST, available_bytes() // 4)
    cache_bytes, byte_seconds = read_curves({name: _curve(kind, path, largest) for name, kind in PRODUCTS.items()})
    return MemorySpeed(_copy_rate(device), cache_bytes, byte_seconds)


def read_curves(curves: dict[str, Curve]) -> tuple[float, dict[str, float]]:
    """Return (`cache_bytes`, `byte_seconds`) from a curve for each kind of products.

    The cache size comes from the kind whose products slow down most beyond the cache, because it shows the edge best.
    """
    byte_seconds = {name: max(0.0, float(seconds[-1] - seconds[0])) for name, (_, seconds) in curves.items()}
    nbytes, seconds = max(curves.values(), key=lambda curve: float(curve[1][-1] / curve[1][0]))
    halfway = (seconds[0] + seconds[-1]) / 2
    return float(np.exp2(np.interp(halfway, np.maximum.accumulate(seconds), np.log2(nbytes)))), byte_seconds


def _curve(kind: Products, path: str, largest: int) -> Curve:
    """Time passes over one matrix, two, four and so on, up to `largest` bytes of weights."""
    a_matrix = int(SIDE * SIDE * kind.layer_bytes)
    counts = [1 << i for i in range(max(2, (largest // a_matrix).bit_length()))]
    products = [_product(kind, path) for _ in range(counts[-1])]
    seconds = [_fastest_pass(products[:count]) / (count * a_matrix) for count in counts]
    return np.array(counts) * float(a_matrix), np.array(seconds)


def _product(kind: Products, path: str) -> Callable[[], object]:
    """Make a product of ROWS rows with a new matrix, which a call computes."""
    backend, dtype = choose_backend("cpu", True, path), getattr(torch, kind.dtype)
    weight = torch.ones(SIDE, SIDE, dtype=dtype if kind.quantization == "none" else torch.int8)
    if kind.quantization == "none":
        made = backend.linear(weight)
    elif kind.quantization == "w4a8" and isinstance(backend, CompiledBackend):
        scale = torch.ones(SIDE, SIDE // 128)
        made = backend.linear_w4a8(weight, scale, torch.zeros_like(scale), None)
    else:
        made = backend.linear_w8a8(weight, torch.ones(SIDE))
    rows = backend.rows(torch.ones(ROWS, SIDE, dtype=dtype), made.takes)
    return lambda: made(rows)


def _fastest_pass(products: list[Callable[[], object]]) -> float:
    """Return the least seconds of a pass over all products; the first pass is left out."""
    times = list[float]()
    while len(times) < 2 or (len(times) <= PASSES and sum(times) < PASSES_SECONDS):
        started = time.perf_counter()
        for product in products:
            product()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _copy_rate(device: str) -> float:
    """Return the bytes a second, read and written, of the fastest of five copies."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * COPY_BYTES / best
