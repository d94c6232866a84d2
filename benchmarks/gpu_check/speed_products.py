"""Matrix products of Llama-3-8B's layers by kind and number of rows: which path is the faster one, and how near to what
the device can do."""

from collections.abc import Callable
from itertools import product

import torch
from gpu_check import ceilings
from gpu_check.ceilings import Ceilings
from gpu_check.engines import release
from gpu_check.session import Session
from gpu_check.timing import Clock
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.linear_triton import linear
from batchinfer.kernels.linear_w8a8_triton import linear_w8a8
from batchinfer.kernels.products_triton import FourBitProduct
from batchinfer.kernels.rows import Rows

SIZES = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROWS = (1, 4, 16, 64, 256, 2048)
F8 = torch.float8_e4m3fn
LEAST = 32
"""Rows that `torch._int_mm` gets at least: it takes no fewer than 17."""
FEW = 16
"""Up to so many rows 4-bit weights are to be `TWICE` as fast as bfloat16."""
TWICE = 2.0
Call = Callable[[], object]
Medians = dict[tuple[str, str, int], float]


def run(session: Session) -> None:
    """All kinds, layers and numbers of rows."""
    ceiling, clock, medians = ceilings.known(session), Clock(session), Medians()
    sizes = session.pick(SIZES, {"qkv": (64, 128)})
    for name, (n, k) in sizes.items():
        _layer(session, clock, ceiling, medians, name, n, k)
        release(session)
        session.say(f"{name}, {session.left:.0f} s left")
    _faster(session, medians)
    _four_bits(session, medians)


def _layer(session: Session, clock: Clock, ceiling: Ceilings, medians: Medians, name: str, n: int, k: int) -> None:
    generator, on = session.generator(), session.device
    kinds: dict[str, tuple[float, str, Callable[[int], Call]]] = {}
    with session.case(f"weights of {name}"):
        kinds = _kinds(session, torch.randn(n, k, generator=generator, device=on))
    for (kind, (weight_bytes, unit, make)), rows in product(kinds.items(), session.pick(ROWS, (1, 17))):
        with session.case(f"{name}, {kind}, {rows} rows"):
            times = clock(make(rows))
            medians[name, kind, rows] = times.p50
            x_bytes = 1 if unit != "bf16" else session.dtype.itemsize
            nbytes = weight_bytes + rows * (k * x_bytes + n * session.dtype.itemsize)
            columns = ceiling.columns(times, nbytes, 2.0 * rows * n * k, unit)
            session.row("Matrix products", layer=name, kind=kind, rows=rows, **columns)


def _kinds(session: Session, weight: Tensor) -> dict[str, tuple[float, str, Callable[[int], Call]]]:
    """By kind: bytes of the weights, the unit that multiplies, and the call for a number of rows."""
    (n, k), dtype, on = weight.shape, session.dtype, session.device
    floats, scale = weight.to(dtype), torch.rand(n, device=on) + 0.5
    fp8, int8 = weight.to(F8), (40 * weight).clamp_(-127, 127).to(torch.int8)
    group = session.pick(128, 32)
    numbers = (2.5 * weight).round_().clamp_(-8, 7).to(torch.int8)
    nothing = torch.zeros(n, k // group, device=on)
    four = FourBitProduct(numbers, nothing + 0.01, None, None, dtype, session.gpu, deterministic=False)

    def noise(rows: int) -> Tensor:
        return torch.randn(rows, k, generator=session.generator(rows), device=on)

    def eight(rows: int, kind: torch.dtype) -> Rows:
        values = noise(rows).to(F8) if kind == F8 else (40 * noise(rows)).clamp_(-127, 127).to(torch.int8)
        return Rows(values, torch.rand(rows, 1, device=on) + 0.5)

    def by_torch(rows: int) -> Call:
        x = noise(rows).to(dtype)
        return lambda: F.linear(x, floats)

    def by_one_tile(rows: int) -> Call:
        x = noise(rows).to(dtype)
        return lambda: linear(x, floats)

    def ours(weights: Tensor) -> Callable[[int], Call]:
        def make(rows: int) -> Call:
            x = eight(rows, weights.dtype)
            return lambda: linear_w8a8(x, weights, scale, None, dtype, session.gpu)

        return make

    def fp8_by_torch(rows: int) -> Call:
        x, columns = eight(rows, F8), scale.view(1, -1)
        return lambda: torch._scaled_mm(x.values, fp8.t(), x.scale, columns, None, out_dtype=torch.bfloat16)

    def int8_by_torch(rows: int) -> Call:
        x = eight(max(rows, LEAST), torch.int8)
        return lambda: torch._int_mm(x.values, int8.t())

    def four_bits(rows: int) -> Call:
        x = Rows(noise(rows).to(dtype))
        return lambda: four(x)

    kinds: dict[str, tuple[float, str, Callable[[int], Call]]] = {
        "bf16": (floats.nbytes, "bf16", by_torch),
        "bf16, deterministic": (floats.nbytes, "bf16", by_one_tile),
        "w8a8-fp8, torch": (fp8.nbytes, "fp8", fp8_by_torch),
        "w8a8-fp8, Triton": (fp8.nbytes, "fp8", ours(fp8)),
        "w8a8-int8, torch, int32 out": (int8.nbytes, "int8", int8_by_torch),
        "w8a8-int8, Triton": (int8.nbytes, "int8", ours(int8)),
        "w4a16": (four.nbytes, "bf16", four_bits),
    }
    if session.smoke:  # the CPU's torch has no such product with a scale a row
        del kinds["w8a8-fp8, torch"]
    return kinds


def _faster(session: Session, medians: Medians) -> None:
    """Which path is to be taken, by type, layer and rows; torch's int8 has its scales still to come."""
    for unit, theirs in (("w8a8-fp8", "w8a8-fp8, torch"), ("w8a8-int8", "w8a8-int8, torch, int32 out")):
        for (layer, kind, rows), torchs in medians.items():
            ours = medians.get((layer, f"{unit}, Triton", rows))
            if kind != theirs or ours is None:
                continue
            session.row(
                "The faster path of 8-bit products (int8 by torch: without scales, at least 32 rows)",
                kind=unit,
                layer=layer,
                rows=rows,
                **{"torch, us": torchs, "Triton, us": ours, "torch / Triton": torchs / ours},
                faster="Triton" if ours <= torchs else "torch",
            )


def _four_bits(session: Session, medians: Medians) -> None:
    """How much faster than bfloat16."""
    ratios = {}
    for (layer, kind, rows), ours in medians.items():
        if kind == "w4a16" and (floats := medians.get((layer, "bf16", rows))) is not None:
            ratios[layer, rows] = floats / ours
            session.row(
                "4-bit weights beside bfloat16",
                layer=layer,
                rows=rows,
                **{"bf16, us": floats, "w4a16, us": ours, "times as fast": floats / ours},
            )
    if few := {at: ratio for at, ratio in ratios.items() if at[1] <= FEW}:
        at = min(few, key=few.__getitem__)
        aim = f"4-bit weights, 1 to {FEW} rows: {TWICE:.0f} times as fast as bfloat16 in every layer"
        session.findings.aim(aim, f"{few[at]:.2f} times at the least ({at[0]}, {at[1]} rows)", few[at] >= TWICE)
