"""The product of 4-bit weights against the weights that they stand for, on each path."""

import pytest
import torch
from torch import Tensor

from batchinfer.kernels.linear_w4a16 import GROUPS, LinearW4A16
from batchinfer.kernels.rows import Rows


def four_bits(n: int, k: int, group: int, zero_points: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(values, scale, zero point) as a checkpoint has them, scales in float16 and of both signs."""
    values = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    scale = (0.01 * (torch.rand(n, k // group) + 0.5)).half().float()
    scale *= torch.randn(scale.shape).sign()
    zero_point = torch.randint(-8, 8, scale.shape) if zero_points else torch.zeros(scale.shape)
    return values, scale, zero_point.float()


def dequantized(values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    group = values.shape[1] // scale.shape[1]
    return (values.double() - zero_point.repeat_interleave(group, 1)) * scale.double().repeat_interleave(group, 1)


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize(("n", "groups"), [(16, 1), (48, 3), (80, 2), (1008, 5)])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_w4a16_is_the_product_of_what_the_weights_stand_for(
    path: str, n: int, groups: int, group: int, zero_points: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHINFER_KERNELS", path)
    weights = four_bits(n, groups * group, group, zero_points)
    added = torch.randn(n).bfloat16() if bias else None
    product = LinearW4A16(*weights, added)
    assert product.path == path
    x = torch.randn(63, groups * group).bfloat16()
    exact = x.double() @ dequantized(*weights).t()
    got = product(Rows(x)).values
    assert got.dtype == torch.bfloat16
    exact += 0 if added is None else added.double()
    # bfloat16 rounds to one part in 256 at most: each weight or its scale once, the product once, its bias once.
    error = (got.double() - exact).norm() / exact.norm()
    assert error < 1 / 256
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 16, 31):
        assert product(Rows(x[:rows])).values.equal(got[:rows]), rows
        assert product(Rows(x[-rows:])).values.equal(got[-rows:]), rows


def test_w4a16_is_exact_where_nothing_is_rounded() -> None:
    """Weights and rows of few bits, scales that are powers of two: all sums are whole numbers below 256."""
    values = torch.randint(-8, 8, (32, 64), dtype=torch.int8)
    scale, zero_point = 2.0 ** torch.randint(-3, 3, (32, 2)).float(), torch.randint(-8, 8, (32, 2)).float()
    x = torch.eye(64).bfloat16()
    assert (
        LinearW4A16(values, scale, zero_point)(Rows(x))
        .values.double()
        .t()
        .equal(dequantized(values, scale, zero_point))
    )


@pytest.mark.parametrize(("n", "k", "groups"), [(15, 64, 2), (16, 64, 4), (16, 96, 1), (1, 32, 1)])
def test_w4a16_of_sizes_that_it_does_not_take_is_refused(n: int, k: int, groups: int) -> None:
    with pytest.raises(ValueError, match=rf"4-bit weights \[{n}, {k}\] with groups of {k // groups}"):
        LinearW4A16(torch.zeros(n, k, dtype=torch.int8), torch.ones(n, groups), torch.zeros(n, groups))


def test_w4a16_holds_half_a_byte_a_weight() -> None:
    product = LinearW4A16(*four_bits(64, 512, 128, True))
    assert product.nbytes == 64 * 512 // 2 + 64 * 4 * 2 * 2
    assert product.operations_per_row == 2 * 64 * 512
