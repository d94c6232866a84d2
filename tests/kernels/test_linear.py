"""The floating-point product: a row's bits do not depend on the rows beside it."""

import pytest
import torch

from batchinfer.kernels import linear
from batchinfer.kernels.linear import Linear
from batchinfer.kernels.rows import Rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(96, 96), (320, 63), (1000, 384), (4096, 640)])
def test_a_row_of_a_product_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype, n: int, k: int) -> None:
    product = Linear(torch.randn(n, k).to(dtype))
    x = torch.randn(320, k).to(dtype)
    whole = product(Rows(x)).values
    for rows in (8, 16, 24, 64, 128, 256):
        assert product(Rows(x[:rows])).values.equal(whole[:rows])
    with pytest.raises(ValueError, match="7 rows; pad them to a multiple of 8"):
        product(Rows(x[:7]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(96, 96), (1100, 2000), (512, 11008), (3, 1 << 20)])
def test_a_widened_product_is_rounded_once(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, n: int, k: int) -> None:
    """Compute it in pieces of the weight, as on processors without products of this type."""
    monkeypatch.setattr(linear, "multiplied_in", lambda dtype: torch.float32)
    weight, bias, x = torch.randn(n, k).div(k**0.5).to(dtype), torch.randn(n).to(dtype), torch.randn(64, k).to(dtype)
    product = Linear(weight, bias)
    assert product.path == f"{str(dtype).removeprefix('torch.')}, widened to float32"
    found = product(Rows(x)).values
    assert found.dtype == dtype
    torch.testing.assert_close(
        found, (x.double() @ weight.double().T + bias.double()).to(dtype), atol=1e-5, rtol=torch.finfo(dtype).eps
    )
    for rows in (8, 16, 24, 32):
        assert product(Rows(x[:rows])).values.equal(found[:rows])
