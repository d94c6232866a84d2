"""Where Triton's interpreter computes otherwise than a GPU: what `docs/interpreter.md` says of it.

A test that fails here says that Triton has mended something. Then the page and the tests that make room for it are to
be changed.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, at import

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _convert(p_x, p_out, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    o = tl.arange(0, COUNT)
    tl.store(p_out + o, tl.load(p_x + o).to(p_out.dtype.element_ty))


@triton.jit
def _largest(p_x, p_out, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(p_out, tl.max(tl.load(p_x + tl.arange(0, COUNT))))


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.zeros(len(x), dtype=dtype)
    _convert[(1,)](x, out, COUNT=len(x))
    return out


def test_bfloat16_is_truncated_and_not_rounded() -> None:
    """1 + 3/512 lies nearer to 1 + 1/128, which torch and every GPU make of it."""
    x = torch.tensor([1 + 3 / 512, -1 - 3 / 512])
    assert converted(x, torch.bfloat16).tolist() == [1.0, -1.0]
    assert x.to(torch.bfloat16).tolist() == [1 + 1 / 128, -1 - 1 / 128]


def test_float8_above_its_largest_number_is_nan_or_too_small() -> None:
    """Every GPU makes 448 of them, the largest number there is, and so does torch."""
    x = torch.tensor([448.0, 463.0, 464.0, -480.0, 500.0, 1000.0, 10_000.0, -500.0])
    found = converted(x, torch.float8_e4m3fn).float()
    assert found.isnan().tolist() == [False, False, True, True, False, False, False, False]
    assert found[[0, 1, 4, 5, 6, 7]].tolist() == [448.0, 448.0, 256.0, 256.0, 320.0, -256.0]
    assert x.to(torch.float8_e4m3fn).float().tolist() == [448.0, 448.0, 448.0, -448.0, 448.0, 448.0, 448.0, -448.0]


def test_rounding_to_float8_that_carries_into_the_exponent_halves_the_number() -> None:
    x = torch.tensor([1.9999, 31.9, 1.5, 1.0])
    assert converted(x, torch.float8_e4m3fn).float().tolist() == [1.0, 16.0, 1.5, 1.0]
    assert x.to(torch.float8_e4m3fn).float().tolist() == [2.0, 32.0, 1.5, 1.0]


def test_a_maximum_ignores_nan() -> None:
    out = torch.zeros(1)
    _largest[(1,)](torch.tensor([1.0, float("nan"), 3.0, 2.0]), out, COUNT=4)
    assert out.item() == 3.0
