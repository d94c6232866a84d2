"""Rows in 8 bits against the numbers that they stand for."""

import pytest
import torch
from true_values import true_values

from batchinfer.formats.matrix import quantize_channels
from batchinfer.kernels.linear_w8a8 import LinearW8A8
from batchinfer.kernels.rows import Rows, add_rows, quantize_rows


@pytest.mark.parametrize("columns", [1, 63, 500])
def test_rows_are_within_half_a_step_of_what_they_stand_for(columns: int) -> None:
    x = torch.randn(9, columns)
    x[4] = 0
    rows = quantize_rows(x.clone())
    assert rows.scale is not None
    error = (true_values(rows) - x.double()).abs()
    assert (error <= rows.scale.double() * 0.5000001).all()
    torch.testing.assert_close(rows.scale[:, 0] * 127, x.abs().amax(-1).clamp(min=1e-30), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_marked_and_alone(bad: float) -> None:
    x = torch.randn(8, 32)
    clean = quantize_rows(x.clone())
    x[3, 5] = bad
    rows = quantize_rows(x.clone())
    weight = LinearW8A8(*quantize_channels(torch.randn(16, 32)))
    assert not weight(rows).dense()[3].isfinite().any()
    others = [i for i in range(8) if i != 3]
    assert rows.values[others].equal(clean.values[others])


def test_residual() -> None:
    x, y, scale = torch.randn(8, 5), torch.randn(8, 5), torch.rand(8, 1)
    torch.testing.assert_close(add_rows(x.clone(), Rows(y, scale)), x + y * scale)
    assert add_rows(x.clone(), Rows(y)).equal(x + y)
