"""Matrix products of Llama-3-8B's layers by kind and number of rows, ours beside the vendor's."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from gpu_check.cases import Case
from gpu_check.ceilings import Ceilings
from gpu_check.session import Session
from gpu_check.timing import Call
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.linear_triton import linear
from batchinfer.kernels.linear_w8a8_triton import linear_w8a8
from batchinfer.kernels.products_triton import FourBitProduct
from batchinfer.kernels.rows import Rows

TITLE = "Matrix products"
FASTER = "The faster path of 8-bit products (int8 by torch: without scales, at least 32 rows)"
SIZES = {"qkv": (6144, 4096), "gate_up": (28672, 4096), "out": (4096, 4096), "down": (4096, 14336)}
ROWS = (1, 16, 256, 64, 2048)
F8 = torch.float8_e4m3fn
LEAST = 32
"""Rows that `torch._int_mm` gets at least: it takes no fewer than 17."""
FEW = 16
"""Up to so many rows 4-bit weights are to reach `COPIED` percent of a copy's rate."""
COPIED = 65.0
FAST_SUMS = False
"""Whether float8 products add in the fast way, of fewer digits: ours do not, so torch's are not to either."""


@dataclass(frozen=True)
class Kind:
    """A way to multiply: bytes of the weights an element, the unit that multiplies, and the call for so many rows."""

    weight_bytes: float
    unit: str
    make: Callable[[Session, int, int, int], Call]  # by rows, n and k
    ours: bool = True


def cases(session: Session) -> list[Case]:
    """All kinds, layers and numbers of rows; few layers of many rows, because those take long."""
    sizes = session.pick(SIZES, {"qkv": (64, 128)})
    found = []
    for rows, (layer, (n, k)), (name, kind) in product(
        session.pick(ROWS, (1, 17)), sizes.items(), _kinds(session).items()
    ):
        if rows > 256 and layer not in ("qkv", "down"):
            continue
        itemsize = session.dtype.itemsize
        nbytes = kind.weight_bytes * n * k + rows * (k * (1 if kind.unit != "bf16" else itemsize) + n * itemsize)
        columns = {"layer": layer, "kind": name, "rows": rows}
        found.append(
            Case(
                TITLE,
                columns,
                partial(kind.make, session, rows, n, k),
                nbytes,
                2.0 * rows * n * k,
                kind.unit,
                kind.ours,
            )
        )
    return found


def _kinds(session: Session) -> dict[str, Kind]:
    """Return the kinds of product by name."""
    dtype, on = session.dtype, session.device

    def noise(rows: int, k: int) -> Tensor:
        return torch.randn(rows, k, generator=session.generator(rows), device=on)

    def integers(rows: int, k: int) -> Tensor:
        return (40 * noise(rows, k)).clamp_(-127, 127).to(torch.int8)

    def scales(*shape: int) -> Tensor:
        return torch.rand(shape, generator=session.generator(1), device=on) + 0.5

    def by_torch(_: Session, rows: int, n: int, k: int) -> Call:
        x, weight = noise(rows, k).to(dtype), noise(n, k).to(dtype)
        return lambda: F.linear(x, weight)

    def by_one_tile(_: Session, rows: int, n: int, k: int) -> Call:
        x, weight = noise(rows, k).to(dtype), noise(n, k).to(dtype)
        return lambda: linear(x, weight)

    def fp8(_: Session, rows: int, n: int, k: int) -> Call:
        x, weight, scale = Rows(noise(rows, k).to(F8), scales(rows, 1)), noise(n, k).to(F8), scales(n)
        return lambda: linear_w8a8(x, weight, scale, None, dtype, session.gpu)

    def fp8_by_torch(_: Session, rows: int, n: int, k: int) -> Call:
        x, weight, row_scale, scale = noise(rows, k).to(F8), noise(n, k).to(F8), scales(rows, 1), scales(1, n)
        return lambda: torch._scaled_mm(
            x, weight.t(), row_scale, scale, out_dtype=torch.bfloat16, use_fast_accum=FAST_SUMS
        )

    def int8(_: Session, rows: int, n: int, k: int) -> Call:
        x, weight, scale = Rows(integers(rows, k), scales(rows, 1)), integers(n, k), scales(n)
        return lambda: linear_w8a8(x, weight, scale, None, dtype, session.gpu)

    def int8_by_torch(_: Session, rows: int, n: int, k: int) -> Call:
        x, weight = integers(max(rows, LEAST), k), integers(n, k)
        return lambda: torch._int_mm(x, weight.t())

    def four_bits(_: Session, rows: int, n: int, k: int) -> Call:
        groups = k // session.pick(128, 32)
        numbers = (2.5 * noise(n, k)).round_().clamp_(-8, 7).to(torch.int8)
        scale = torch.full((n, groups), 0.01, device=on)
        weights = FourBitProduct(numbers, scale, None, None, dtype, session.gpu, deterministic=False)
        x = Rows(noise(rows, k).to(dtype))
        return lambda: weights(x)

    four = 0.5 + 2 / session.pick(128, 32)
    kinds = {
        "w4a16": Kind(four, "bf16", four_bits),
        "bf16, torch": Kind(dtype.itemsize, "bf16", by_torch, ours=False),
        "w8a8-fp8, Triton": Kind(1, "fp8", fp8),
        "w8a8-fp8, torch": Kind(1, "fp8", fp8_by_torch, ours=False),
        "w8a8-int8, Triton": Kind(1, "int8", int8),
        "w8a8-int8, torch, int32 out": Kind(1, "int8", int8_by_torch, ours=False),
        "bf16, one tile": Kind(dtype.itemsize, "bf16", by_one_tile),
    }
    without = {name for name in kinds if "fp8" in name and not session.gpu.has_float8}
    # The CPU's torch has no such product with a scale a row.
    without |= {"w8a8-fp8, torch"} if session.smoke else set()
    return {name: kind for name, kind in kinds.items() if name not in without}


def judge(session: Session, ceiling: Ceilings) -> None:
    """Hold 4-bit weights to their aim, and tell which path of 8-bit products is the faster one."""
    rows = {(row["layer"], row["kind"], row["rows"]): row for row in session.rows(TITLE)}
    for count in sorted({at[2] for at in rows if at[2] <= FEW}):
        # All layers together: the smallest alone takes little longer than a kernel that does nothing.
        four = [row for at, row in rows.items() if at[1:] == ("w4a16", count)]
        if four:
            moved = sum(row["GB/s"] * row["p50, us"] for row in four)
            took = sum(row["p50, us"] for row in four)
            reached = 1e11 * moved / took / ceiling.bytes_per_second
            aim = f"4-bit weights, {count} rows, {len(four)} products of a layer: {COPIED:.0f} % of a copy"
            session.findings.aim(aim, f"{reached:.0f} %", reached >= COPIED)
    for (layer, kind, count), row in rows.items():
        unit = kind.partition(",")[0]
        ours = rows.get((layer, f"{unit}, Triton", count))
        if kind.startswith(f"{unit}, torch") and ours is not None:
            theirs, own = row["p50, us"], ours["p50, us"]
            times = {"torch, us": theirs, "Triton, us": own, "torch / Triton": theirs / own}
            session.row(
                FASTER, kind=unit, layer=layer, rows=count, **times, faster="Triton" if own <= theirs else "torch"
            )
