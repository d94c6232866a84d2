"""What the device can do at most, measured with torch: bytes of a copy and operations of large products, a second."""

from dataclasses import asdict, dataclass

import torch
from gpu_check.engines import release
from gpu_check.session import Session
from gpu_check.timing import Clock, Times

TITLE = "Ceilings"
KINDS = ("bf16", "fp8", "int8")
FAST = "fp8 with fast sums"
"""The kind of float8 product whose sums have fewer digits. Neither our products nor their rivals add so."""


@dataclass(frozen=True)
class Ceilings:
    """As measured in this run."""

    bytes_per_second: float  # read and written bytes of a copy
    bf16: float  # operations a second
    fp8: float
    int8: float

    def of(self, kind: str) -> float:
        """Operations a second of products in "bf16", "fp8" or "int8"."""
        return float(asdict(self)[kind])

    def columns(self, times: Times, nbytes: float, operations: float = 0.0, kind: str = "bf16") -> dict[str, object]:
        """What belongs beside the times of a kernel that must move and compute so much."""
        reading, computing = nbytes / self.bytes_per_second, operations / self.of(kind)
        columns: dict[str, object] = {**times.columns, "GB/s": nbytes / times.seconds / 1e9}
        if operations:
            columns["TFLOP/s"] = operations / times.seconds / 1e12
        columns["bound by"] = "bytes" if reading >= computing else kind
        columns["of the ceiling, %"] = 100 * max(reading, computing) / times.seconds
        return columns


def run(session: Session) -> None:
    """Into the session's table."""
    found = measure(session)
    session.say(f"{found}")


def known(session: Session) -> Ceilings:
    """Those that an earlier part has measured, or measured now."""
    for row in session.rows(TITLE):
        return Ceilings(row["copy, GB/s"] * 1e9, *(row[f"{kind}, TFLOP/s"] * 1e12 for kind in KINDS))
    return measure(session)


def measure(session: Session) -> Ceilings:
    """Medians of some repeats on random data; 0 for what torch cannot multiply here."""
    clock = Clock(session)
    size = session.pick(1 << 31, 1 << 17)
    copied = _copy(session, clock, size)
    release(session)
    rates = dict.fromkeys((*KINDS, FAST), 0.0)
    for kind in rates:
        with session.case(f"the largest {kind} product of torch"):
            if kind in (FAST, "fp8") and not session.gpu.has_float8:
                continue
            rates[kind] = _product(session, clock, kind, session.pick(8192, 64))
        release(session)
    found = Ceilings(copied, *(rates[kind] or float("nan") for kind in KINDS))
    session.row(
        TITLE,
        **{"copy, GB/s": copied / 1e9, "read and written, GB": 2 * size / 1e9},
        **{f"{kind}, TFLOP/s": (rate or float("nan")) / 1e12 for kind, rate in rates.items()},
        **{"a kernel that does nothing, us (in every figure)": clock.floor().p50},
    )
    return found


def _copy(session: Session, clock: Clock, size: int) -> float:
    """Bytes a second, those that are read and those that are written, of a copy of `size` bytes."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=session.generator(), device=session.device)
    target = torch.empty_like(source)
    return 2 * size / clock.plain(lambda: target.copy_(source)).seconds


def _product(session: Session, clock: Clock, kind: str, size: int) -> float:
    generator, on = session.generator(), session.device

    def noise() -> torch.Tensor:
        return torch.randn(size, size, generator=generator, device=on)

    if kind == "bf16":
        x, w = noise().bfloat16(), noise().bfloat16()
        times = clock.plain(lambda: x @ w.t())
    elif kind == "int8":
        x, w = (40 * noise()).clamp_(-127, 127).to(torch.int8), (40 * noise()).clamp_(-127, 127).to(torch.int8)
        times = clock.plain(lambda: torch._int_mm(x, w.t()))
    else:
        x, w = noise().to(torch.float8_e4m3fn), noise().to(torch.float8_e4m3fn)
        one = torch.ones((), device=on)
        times = clock.plain(
            lambda: torch._scaled_mm(
                x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=kind == FAST
            )
        )
    return 2 * size**3 / times.seconds
