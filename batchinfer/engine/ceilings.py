"""Measuring what a device could do at most: operations a second of a scheme's product, bytes a second of memory."""

import time

import torch

from batchinfer.formats.matrix import quantize_channels
from batchinfer.formats.scheme import QuantScheme
from batchinfer.kernels.backend import Backend
from batchinfer.kernels.backend_compiled import CompiledBackend
from batchinfer.kernels.product import Product
from batchinfer.kernels.rows import Rows


def measure_peak(scheme: QuantScheme, dtype: torch.dtype, backend: Backend, seconds: float = 0.3) -> float:
    """Measure the scheme's matrix product for `seconds`; return the operations a second of the fastest repeat.

    The product is 512 x 4096 x 2048 on the CPU, and 4096 x 4096 x 4096 on a GPU.
    """
    m, n, k = (512, 4096, 2048) if backend.device.type == "cpu" else (4096, 4096, 4096)
    noise = torch.Generator(backend.device).manual_seed(0)
    weight = torch.randn(n, k, device=backend.device, generator=noise)
    x = torch.randn(m, k, device=backend.device, generator=noise)
    if scheme.weight_bits == 4 and isinstance(backend, CompiledBackend):
        scale = torch.ones(n, k // 128)
        four_bits = weight.clamp_(-3, 3).round_().to(torch.int8)
        product: Product = backend.linear_w4a8(four_bits, scale, torch.zeros_like(scale), None)
    elif scheme.quantized:
        kind = torch.float8_e4m3fn if scheme.activations == "fp8" else torch.int8
        product = backend.linear_w8a8(*quantize_channels(weight, kind), out=dtype)
    else:
        product, x = backend.linear(weight.to(dtype)), x.to(dtype)
    rows = backend.rows(x, product.takes)

    def once() -> None:
        product(Rows(rows.values, rows.scale))
        if backend.device.type == "cuda":
            torch.cuda.synchronize()

    once()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        once()
        best = min(best, time.perf_counter() - started)
    return 2 * m * n * k / best


def measure_copies(device: torch.device, nbytes: int = 1 << 26) -> float:
    """Return the bytes a second, read and written, of the fastest of five copies of `nbytes`."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * nbytes / best
