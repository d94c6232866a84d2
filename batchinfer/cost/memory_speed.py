"""`MemorySpeed`: what a device's memory costs, and how much of it the last cache saves, both measured.

A virtual machine is told the last cache of its whole host, and has a part of it. And the small models that steps are
timed on stay in that cache, so that they do not tell what a byte from memory takes. So products are timed on more and
more weights.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from batchinfer.cost.step_cost import PRODUCTS, Floats, Products
from batchinfer.host.memory import available_bytes
from batchinfer.kernels.backend_cpu import CpuBackend

SIDE = 2048  # of the matrices: 4 to 16 MB, which most last caches hold
ROWS = 32  # that they are multiplied with: between a step of a few rows and one of many
LARGEST = 1 << 30  # bytes of weights, which no processor's part of a cache holds
PASSES = 4  # timed, over each number of matrices; fewer where they take longer than
PASSES_SECONDS = 0.5  # together, which on slow processors they do
COPY_BYTES = 1 << 28

Curve = tuple[Floats, Floats]
"""Bytes of weights, growing, and the seconds that each of these bytes takes."""


@dataclass(frozen=True)
class MemorySpeed:
    """Of one device."""

    bytes_per_second: float  # of a copy, read and written bytes counted
    cache_bytes: float  # of so many bytes of weights, half come from memory in every step
    byte_seconds: dict[str, float]  # by the name of `PRODUCTS`: what a byte of weights takes longer from memory


def measure_memory(device: str) -> MemorySpeed:
    """Five seconds on two cores. Of a GPU the driver tells the cache; models that steps are timed on exceed it."""
    if device == "cuda":
        cache_bytes = float(torch.cuda.get_device_properties(0).L2_cache_size)
        return MemorySpeed(_copy_rate(device), cache_bytes, dict.fromkeys(PRODUCTS, 0.0))
    largest = min(LARGEST, available_bytes() // 4)
    cache_bytes, byte_seconds = read_curves({name: _curve(kind, largest) for name, kind in PRODUCTS.items()})
    return MemorySpeed(_copy_rate(device), cache_bytes, byte_seconds)


def read_curves(curves: dict[str, Curve]) -> tuple[float, dict[str, float]]:
    """`cache_bytes` and `byte_seconds`, from a curve for each kind of products.

    The kind that waits for memory the most shows best where the cache ends.
    """
    byte_seconds = {name: max(0.0, float(seconds[-1] - seconds[0])) for name, (_, seconds) in curves.items()}
    nbytes, seconds = max(curves.values(), key=lambda curve: float(curve[1][-1] / curve[1][0]))
    halfway = (seconds[0] + seconds[-1]) / 2
    return float(np.exp2(np.interp(halfway, np.maximum.accumulate(seconds), np.log2(nbytes)))), byte_seconds


def _curve(kind: Products, largest: int) -> Curve:
    """Of products with one matrix, with two, with four, and so on."""
    a_matrix = int(SIDE * SIDE * kind.layer_bytes)
    counts = [1 << i for i in range(max(2, (largest // a_matrix).bit_length()))]
    products = [_product(kind) for _ in range(counts[-1])]
    seconds = [_fastest_pass(products[:count]) / (count * a_matrix) for count in counts]
    return np.array(counts) * float(a_matrix), np.array(seconds)


def _product(kind: Products) -> Callable[[], object]:
    """With weights of its own."""
    backend, dtype = CpuBackend(), getattr(torch, kind.dtype)
    weight = torch.ones(SIDE, SIDE, dtype=dtype if kind.quantization == "none" else torch.int8)
    made = backend.linear(weight) if kind.quantization == "none" else backend.linear_w8a8(weight, torch.ones(SIDE))
    rows = backend.rows(torch.ones(ROWS, SIDE, dtype=dtype), made.takes)
    return lambda: made(rows)


def _fastest_pass(products: list[Callable[[], object]]) -> float:
    """Seconds of one over all of them; the first is not timed."""
    times = list[float]()
    while len(times) < 2 or (len(times) <= PASSES and sum(times) < PASSES_SECONDS):
        started = time.perf_counter()
        for product in products:
            product()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _copy_rate(device: str) -> float:
    """Bytes a second, read and written, of the fastest of some copies."""
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
