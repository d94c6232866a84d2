"""Comparing what a kernel computes with what it should: errors by kernel and type, outputs poisoned beforehand."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_check.session import Session, name_of
from torch import Tensor

WORST = 12
"""How much larger, relative to the largest number, the worst single error may be than the tolerance of them all."""
TITLE = "Largest errors, relative, of all numbers together"


class Errors:
    """The largest error of each kernel and type so far."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}

    def close(self, kernel: str, kind: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
        """`AssertionError` unless |found - expected| / |expected| is at most the tolerance; NaN never is."""
        assert found.shape == expected.shape, f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
        found, expected = found.double(), expected.double()
        size, most = float(expected.norm()), float(expected.abs().max())
        error = float((found - expected).norm()) / (size or 1.0)
        worst = float((found - expected).abs().max()) / (most or 1.0)
        self._note(kernel, kind, error, tolerance)
        assert error <= tolerance, f"{kernel} in {kind}: relative error {error:.2e} instead of at most {tolerance:.0e}"
        assert worst <= WORST * tolerance, f"{kernel} in {kind}: one number is off by {worst:.2e} of the largest"

    def same(self, kernel: str, kind: str, found: Tensor, expected: Tensor) -> None:
        """`AssertionError` unless all numbers are equal."""
        assert found.shape == expected.shape and found.dtype == expected.dtype, (found.dtype, expected.dtype)
        if found.dtype == torch.float8_e4m3fn:
            found, expected = found.view(torch.uint8), expected.view(torch.uint8)
        different = int((found != expected).sum())
        self._note(kernel, kind, float(different), 0.0)
        assert not different, f"{kernel} in {kind}: {different} of {found.numel()} numbers are not equal"

    def write(self, title: str = TITLE) -> None:
        """One row of the session's table for each kernel and type."""
        for (kernel, kind), row in self.rows.items():
            self.session.row(title, kernel=kernel, type=kind, **row)

    def _note(self, kernel: str, kind: str, error: float, tolerance: float) -> None:
        row = self.rows.setdefault((kernel, kind), {"cases": 0, "largest error": 0.0, "tolerance": tolerance})
        row["cases"] += 1
        row["largest error"] = max(row["largest error"], error) if error == error else error
        row["tolerance"] = max(row["tolerance"], tolerance)


def check_quantized(errors: Errors, kernel: str, values: Tensor, scale: Tensor | None, expected: Tensor) -> None:
    """Rounding keeps the order: a row's numbers lie between the roundings of slightly less and slightly more."""
    tolerance = 1e-5  # of float32 sums over a row, and of the device's fast reciprocals
    assert scale is not None and scale.dtype == torch.float32
    kind, most = name_of(values.dtype), 127 if values.dtype == torch.int8 else 448
    exact = expected.double().abs().amax(-1, keepdim=True) / most
    errors.close(f"{kernel}, scales", kind, scale, exact, tolerance)

    def rounded(quotient: Tensor) -> Tensor:
        return quotient.round() if values.dtype == torch.int8 else quotient.float().to(values.dtype).double()

    quotient = expected.double() / exact
    less, more = rounded(quotient * (1 - tolerance)), rounded(quotient * (1 + tolerance))
    found = values.float().double()
    outside = (found < torch.minimum(less, more)) | (found > torch.maximum(less, more)) | found.isnan()
    errors.same(f"{kernel}, numbers", kind, outside, torch.zeros_like(outside))


@contextmanager
def poisoned() -> Iterator[None]:
    """What `torch.empty` gives is NaN, or a number that nobody computes: an output that is not written shows."""
    empty = torch.empty

    def fill(*shape: Any, **kind: Any) -> Tensor:
        made = empty(*shape, **kind)
        if made.dtype.itemsize == 1:
            made.view(torch.uint8).fill_(0x7F)  # NaN in float8
        elif made.is_floating_point():
            made.fill_(float("nan"))
        else:
            made.fill_(-0x5A5A)
        return made

    torch.empty = fill
    try:
        yield
    finally:
        torch.empty = empty
