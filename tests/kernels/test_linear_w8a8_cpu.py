"""The 8-bit product in C against the exact integer product, for any number of rows."""

import ctypes

import pytest
import torch
from compiled import libraries
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.kernels.linear_w8a8_cpu import MOST_COLUMNS, PackedW8A8
from batchinfer.kernels.rows import Rows


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 500), (96, 64), (320, 33), (16, 1100)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_exact(library: ctypes.CDLL, n: int, k: int, bias: bool) -> None:
    x, weight = torch.randint(0, 256, (512, k), dtype=torch.uint8), torch.randint(-128, 128, (n, k), dtype=torch.int8)
    # Powers of two: every product is exact.
    scale, row_scale = 2.0 ** torch.randint(-6, 3, (n,)).float(), 2.0 ** torch.randint(-6, 3, (512, 1)).float()
    added = torch.randint(-5, 6, (n,)).float() if bias else None
    product = PackedW8A8(library, weight, scale, added)
    exact = ((x.long() - 128) @ weight.t().long()).double() * scale * row_scale + (0 if added is None else added)
    for rows in (1, 2, 8, 12, 13, 16, 17, 48, 49, 64, 512):
        assert product(Rows(x[:rows], row_scale[:rows])).dense().double().equal(exact[:rows])


@pytest.mark.parametrize("library", libraries())
@given(rows=st.integers(1, 130), n=st.integers(1, 300), k=st.integers(1, 1200))
@settings(deadline=None, max_examples=60)
def test_any_shapes(library: ctypes.CDLL, rows: int, n: int, k: int) -> None:
    x, weight = torch.randint(0, 256, (rows, k), dtype=torch.uint8), torch.randint(-128, 128, (n, k), dtype=torch.int8)
    product = PackedW8A8(library, weight, torch.ones(n))(Rows(x)).values
    assert product.double().equal((x.double() - 128) @ weight.t().double())


@pytest.mark.parametrize("library", libraries())
def test_the_largest_sums_do_not_overflow(library: ctypes.CDLL) -> None:
    x = torch.tensor([[0], [255]], dtype=torch.uint8).expand(2, MOST_COLUMNS).contiguous()
    weight = torch.full((1, MOST_COLUMNS), -128, dtype=torch.int8)
    found = PackedW8A8(library, weight, torch.ones(1))(Rows(x)).values
    assert found.flatten().tolist() == [128.0 * 128 * MOST_COLUMNS, -127.0 * 128 * MOST_COLUMNS]


@pytest.mark.parametrize("library", libraries()[:1])
def test_more_columns_than_sums_hold_are_refused(library: ctypes.CDLL) -> None:
    weight = torch.ones(1, MOST_COLUMNS + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="65537 columns; 8-bit products take at most 65536"):
        PackedW8A8(library, weight, torch.ones(1))
