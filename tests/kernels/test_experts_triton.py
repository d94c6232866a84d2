"""Products of a mixture's experts in Triton's interpreter, against plain torch in integers or float64."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, at import

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from batchinfer.kernels.experts_triton import FEW, MANY, ExpertTiles, by_expert, expert_tiles
from batchinfer.kernels.float8_inputs import Float8InputProduct, InputScales
from batchinfer.kernels.gpu import INTERPRETED
from batchinfer.kernels.product import Product
from batchinfer.kernels.products_triton import DenseProduct, EightBitProduct, FourBitProduct
from batchinfer.kernels.rows import Rows

EXPERTS = 5
COUNTS = [(1, 1), (3, 2), (17, 2), (100, 3), (200, 5)]  # tokens, experts of each


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What torch allocates and nobody has written is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def chosen(tokens: int, k: int) -> Tensor:
    """Skewed, so that some experts have many rows and others none."""
    generator = torch.Generator().manual_seed(tokens)
    weights = torch.tensor([8.0, 4.0, 1.0, 0.1, 0.01]).expand(tokens, -1)
    return torch.multinomial(weights, k, generator=generator)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(("tokens", "k"), COUNTS)
def test_every_token_has_a_row_with_each_of_its_experts(tokens: int, k: int, many: bool) -> None:
    experts = chosen(tokens, k)
    at = expert_tiles(experts, EXPERTS, many)
    assert at.rows == (MANY if many or 2 * tokens * k >= EXPERTS * MANY else FEW)
    assert len(at.tokens) == len(at.experts) * at.rows
    assert at.experts[at.places // at.rows].equal(experts.to(torch.int32))
    assert at.tokens[at.places].equal(torch.arange(tokens)[:, None].expand(-1, k))
    assert at.places.unique().numel() == tokens * k
    needed = -(-experts.flatten().bincount() // at.rows).sum()
    assert (at.experts >= 0).sum() == needed


def multiply(products: list[Product], x: Rows, at: ExpertTiles) -> Tensor:
    scale = None if x.scale is None else x.scale[at.tokens]
    y = by_expert(products)(Rows(x.values[at.tokens], scale), at)
    assert y.scale is None
    return y.values[at.places]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "k"), COUNTS)
@pytest.mark.parametrize(("n", "size"), [(1, 1), (63, 300), (130, 256)])
def test_int8_is_the_exact_integer_product(n: int, size: int, tokens: int, k: int, bias: bool) -> None:
    x = torch.randint(-128, 128, (tokens, size), dtype=torch.int8)
    weight = torch.randint(-128, 128, (EXPERTS, n, size), dtype=torch.int8)
    x_scale = 2.0 ** torch.randint(-6, 3, (tokens, 1)).float()  # powers of two: every product is exact
    scale = 2.0 ** torch.randint(-6, 3, (EXPERTS, n)).float()
    added = torch.randint(-5, 6, (EXPERTS, n)).float()
    experts = chosen(tokens, k)
    biases: list[Any] = list(added) if bias else [None] * EXPERTS
    products: list[Product] = [
        EightBitProduct(w, s, b, torch.float32, INTERPRETED, False)
        for w, s, b in zip(weight, scale, biases, strict=True)
    ]
    found = multiply(products, Rows(x, x_scale), expert_tiles(experts, EXPERTS, False))
    exact = torch.einsum("tknd,td->tkn", weight[experts].long(), x.long()).double() * x_scale[:, None] * scale[experts]
    assert found.double().equal(exact + added[experts] * bias)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize(("tokens", "k"), COUNTS)
def test_floating_point(dtype: torch.dtype, tolerance: float, tokens: int, k: int) -> None:
    x, weight = torch.randn(tokens, 300).to(dtype), torch.randn(EXPERTS, 63, 300).to(dtype)
    experts = chosen(tokens, k)
    products: list[Product] = [DenseProduct(w.clone(), None, False) for w in weight]
    found = multiply(products, Rows(x), expert_tiles(experts, EXPERTS, False))
    expected = torch.einsum("tknd,td->tkn", weight[experts].double(), x.double())
    torch.testing.assert_close(found.double(), expected, atol=tolerance * float(expected.abs().max()), rtol=0)


def test_rounded_inputs_are_rounded_before_the_product() -> None:
    way = InputScales(group=0)
    x, weight = torch.randn(9, 64), torch.randn(EXPERTS, 32, 64)
    experts = chosen(9, 2)
    inner = [DenseProduct(w.clone(), None, False) for w in weight]
    rounding: list[Product] = [Float8InputProduct(product, [way], [32]) for product in inner]
    at = expert_tiles(experts, EXPERTS, False)
    rounded = way.rounded_to_float8(x.clone())
    assert not rounded.equal(x)
    expected = torch.einsum("tknd,td->tkn", weight[experts].double(), rounded.double())
    torch.testing.assert_close(multiply(rounding, Rows(x), at).double(), expected, atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="round their inputs differently"):
        by_expert([*rounding[:-1], inner[-1]])


def test_weights_take_no_memory_twice() -> None:
    products = [DenseProduct(torch.randn(32, 64), None, False) for _ in range(EXPERTS)]
    by_expert(list(products))
    assert len({product.weight.untyped_storage().data_ptr() for product in products}) == 1


def test_weights_in_four_bits_are_refused_by_name() -> None:
    values, scale = torch.randint(-8, 8, (64, 128), dtype=torch.int8), torch.rand(64, 1)
    product = FourBitProduct(values, scale, None, None, torch.float32, INTERPRETED, False)
    with pytest.raises(ValueError, match="in 4 bits, which have no kernel on a GPU yet; take --quantization w8a8-int8"):
        by_expert([product] * EXPERTS)
