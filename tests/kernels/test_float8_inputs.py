"""Rounding inputs to float8 beside the compressed-tensors library, and the products behind it."""

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor

from batchinfer.kernels.float8_inputs import Float8InputProduct, InputScales
from batchinfer.kernels.linear import Linear
from batchinfer.kernels.linear_w4a16 import LinearW4A16
from batchinfer.kernels.product import Product
from batchinfer.kernels.rows import Rows


def by_library(x: Tensor, static: float | None = None, **settings: Any) -> Tensor:
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, dynamic=static is None, **settings)
    batch = x[None]  # tokens are its second dimension
    if static is None:
        scale, zero_point = compute_dynamic_scales_and_zp(batch, args, torch.nn.Module())
    else:
        scale, zero_point = torch.tensor([static]), torch.zeros(1)
    return fake_quantize(batch, scale, zero_point, args)[0]


def inputs(rows: int, columns: int) -> Tensor:
    """Small and large numbers side by side, so that some are subnormal in float8, and a row of zeros."""
    x = torch.randn(rows, columns) * 10.0 ** torch.randint(-4, 3, (rows, columns))
    x[1] = 0
    return x


@pytest.mark.parametrize(
    ("scales", "settings"),
    [
        (InputScales(), {"strategy": "token"}),
        (InputScales(group=32), {"strategy": "group", "group_size": 32}),
        (InputScales(static=0.01), {"static": 0.01, "strategy": "tensor"}),
        (InputScales(static=3.0), {"static": 3.0, "strategy": "tensor"}),
    ],
)
def test_inputs_are_rounded_as_the_library_rounds_them(scales: InputScales, settings: dict[str, Any]) -> None:
    x = inputs(63, 96)
    before = x.clone()
    found = scales.rounded_to_float8(x)
    assert found.equal(by_library(x, **settings)) and x.equal(before)
    assert found.unique().numel() > 100 and not found.equal(x)
    if scales.static is not None:
        assert (found.abs().max() == 448 * torch.tensor(scales.static)) == (scales.static < 1), "some are out of range"
    for rows in (1, 7, 40):
        assert scales.rounded_to_float8(x[:rows]).equal(found[:rows])
    narrow = x.bfloat16()
    assert scales.rounded_to_float8(narrow).equal(scales.rounded_to_float8(narrow.float()).bfloat16())


def test_every_number_of_float8_and_what_lies_between_is_rounded_as_torch_rounds_it() -> None:
    """Midpoints go to the even number."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    middle = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, middle, middle.nextafter(numbers[1:]), middle.nextafter(numbers[:-1])])[None]
    assert InputScales(static=1.0).rounded_to_float8(x).equal(x.to(torch.float8_e4m3fn).float())


def test_the_last_group_may_be_smaller() -> None:
    x = inputs(5, 100)
    parts = [InputScales().rounded_to_float8(part) for part in x.split(32, 1)]
    assert InputScales(group=32).rounded_to_float8(x).equal(torch.cat(parts, 1))


def test_a_row_that_is_not_finite_stays_marked_and_alone() -> None:
    for scales in (InputScales(), InputScales(group=8), InputScales(static=1.0)):
        for value in (float("nan"), float("inf")):
            x = torch.ones(5, 16)
            x[2, 3] = value
            kept = scales.rounded_to_float8(x).isfinite().all(1).tolist()
            marked = scales.static is None or value != value  # a static scale has a largest number
            assert kept == [True, True, not marked, True, True]


def linear(weight: Tensor) -> Product:
    return Linear(weight, torch.ones(len(weight)))


def four_bits(weight: Tensor) -> Product:
    scale = torch.full((len(weight), weight.shape[1] // 32), 0.01)
    return LinearW4A16(weight.round().clamp(-8, 7).to(torch.int8), scale, torch.zeros_like(scale))


@pytest.mark.parametrize("make", [linear, four_bits])
def test_the_product_is_that_of_rounded_inputs(make: Any) -> None:
    product, scales = make(4 * torch.randn(48, 64)), InputScales(group=32)
    rounded = Float8InputProduct(product, [scales, scales], [16, 32])
    x = inputs(8, 64).to(product.takes)
    assert rounded(Rows(x.clone())).values.equal(product(Rows(scales.rounded_to_float8(x))).values)
    assert (rounded.takes, rounded.row_grain) == (product.takes, product.row_grain)
    assert (rounded.operations_per_row, rounded.nbytes) == (product.operations_per_row, product.nbytes)
    apart = Float8InputProduct(product, [None, scales, InputScales(static=0.1)], [16, 8, 24])(Rows(x.clone())).values
    ways = [x, scales.rounded_to_float8(x), InputScales(static=0.1).rounded_to_float8(x)]
    parts = [product(Rows(way.clone())).values for way in ways]
    assert apart.equal(torch.cat([parts[0][:, :16], parts[1][:, 16:24], parts[2][:, 24:]], 1))
