"""The product of 8-bit rows with 4-bit weights in C against exact sums, for any number of rows."""

import ctypes

import pytest
import torch
from compiled import libraries
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchinfer.kernels.linear_w4a8_cpu import PackedW4A8
from batchinfer.kernels.linear_w4a16 import GROUPS
from batchinfer.kernels.rows import Rows

SHIFTED = pytest.mark.parametrize("shifted", [False, True])


def weights(n: int, k: int, group: int, shifted: bool) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    zero_point = torch.randint(-8, 8, (n, k // group)).float() if shifted else torch.zeros(n, k // group)
    # Powers of two: every product, and every sum of these few groups, is exact.
    return values, 2.0 ** torch.randint(-3, 3, (n, k // group)).float(), zero_point


def exact(x: Tensor, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    groups = values.double().unflatten(1, (scale.shape[1], -1))
    weight = (groups - zero_point.double()[:, :, None]) * scale.double()[:, :, None]
    return (x.double() - 128) @ weight.flatten(1).t()


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("group", GROUPS)
@SHIFTED
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_exact(library: ctypes.CDLL, group: int, shifted: bool, bias: bool) -> None:
    for n, k in ((16, group), (144, 3 * group), (272, 1280)):
        x, row_scale = torch.randint(0, 256, (130, k), dtype=torch.uint8), 2.0 ** torch.randint(-6, 3, (130, 1)).float()
        of = weights(n, k, group, shifted)
        added = torch.randint(-5, 6, (n,)).float() if bias else None
        expected = exact(x, *of) * row_scale + (0 if added is None else added)
        product = PackedW4A8(library, *of, added)
        for rows in (1, 2, 3, 4, 5, 8, 12, 13, 17, 48, 49, 130):
            assert product(Rows(x[:rows], row_scale[:rows])).dense().double().equal(expected[:rows])


@pytest.mark.parametrize("library", libraries())
@SHIFTED
@given(rows=st.integers(1, 130), panels=st.integers(1, 20), group=st.sampled_from(GROUPS), groups=st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_any_shapes(library: ctypes.CDLL, shifted: bool, rows: int, panels: int, group: int, groups: int) -> None:
    x, of = (
        torch.randint(0, 256, (rows, group * groups), dtype=torch.uint8),
        weights(16 * panels, group * groups, group, shifted),
    )
    assert PackedW4A8(library, *of)(Rows(x)).values.double().equal(exact(x, *of))


@pytest.mark.parametrize("library", libraries())
@SHIFTED
def test_groups_are_added_in_one_order_for_any_number_of_rows(library: ctypes.CDLL, shifted: bool) -> None:
    values, _, zero_point = weights(64, 4096, 32, shifted)
    scale, x = torch.rand(64, 128), torch.randint(0, 256, (512, 4096), dtype=torch.uint8)
    product = PackedW4A8(library, values, scale, zero_point)
    together = product(Rows(x)).values
    expected = exact(x, values, scale, zero_point)
    torch.testing.assert_close(together.double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    for rows in (1, 8, 16, 17, 64):
        apart = [product(Rows(some)).values for some in x.split(rows)]
        assert torch.cat(apart).equal(together)


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("extreme", [-8, 7])
def test_the_largest_sums_do_not_overflow(library: ctypes.CDLL, extreme: int) -> None:
    x = torch.tensor([[0], [255]], dtype=torch.uint8).expand(2, 512).contiguous()
    of = torch.full((16, 512), extreme, dtype=torch.int8), torch.ones(16, 2), torch.zeros(16, 2)
    found = PackedW4A8(library, *of)(Rows(x)).values
    assert found[:, 0].tolist() == [-128.0 * extreme * 512, 127.0 * extreme * 512]
