"""The floating-point product: a row's bits do not depend on the rows beside it."""

import pytest
import torch

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
