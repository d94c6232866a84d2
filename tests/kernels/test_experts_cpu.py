"""The products of experts' rows, alone and among others, and the sum of what they return."""

import pytest
import torch
from torch import Tensor

from batchinfer.kernels import experts, experts_cpu
from batchinfer.kernels.experts_cpu import ExpertSpans, ProductBySpan, WeightedSum, expert_spans
from batchinfer.kernels.grain import MIN_ROWS
from batchinfer.kernels.linear import Linear
from batchinfer.kernels.linear_w4a16 import LinearW4A16
from batchinfer.kernels.linear_w8a8 import LinearW8A8
from batchinfer.kernels.product import Product
from batchinfer.kernels.rows import Rows, quantize_rows

EXPERTS, SIZE = 12, 32
CASES = [(1, 1), (7, 2), (40, 3), (100, EXPERTS), (700, 3)]


def chosen(tokens: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(tokens)])


def owners(at: ExpertSpans) -> Tensor:
    return torch.cat([torch.full((rows,), expert) for expert, rows in at.spans])


@pytest.mark.parametrize(("tokens", "k"), CASES)
@pytest.mark.parametrize("least", [1, MIN_ROWS])
def test_every_token_has_a_row_with_each_of_its_experts(tokens: int, k: int, least: int) -> None:
    ids = chosen(tokens, k)
    at = expert_spans(ids, EXPERTS, MIN_ROWS, least)
    assert owners(at)[at.places].equal(ids)
    assert at.tokens[at.places].equal(torch.arange(tokens)[:, None].expand(-1, k))
    assert at.places.unique().numel() == tokens * k
    for (expert, rows), count in zip(at.spans, ids.unique(return_counts=True)[1].tolist(), strict=True):
        assert count <= rows < count + MIN_ROWS and rows >= least, expert
        assert rows % MIN_ROWS == 0 or rows in (1, 2, 4)


def test_where_any_number_of_rows_is_right_nothing_is_padded() -> None:
    at = expert_spans(chosen(40, 3), EXPERTS, 1, 1)
    assert len(at.tokens) == 120


@pytest.mark.parametrize(("tokens", "k"), CASES)
def test_parts_are_the_rows_in_order_and_split_no_expert(tokens: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_cpu, "PART_ROWS", 100)
    at = expert_spans(chosen(tokens, k), EXPERTS, MIN_ROWS, 1)
    assert torch.cat([part.tokens for part in at.parts]).equal(at.tokens)
    assert [span for part in at.parts for span in part.spans] == at.spans
    assert all(len(part.tokens) == len(owners(part)) for part in at.parts)
    assert all(len(part.tokens) <= 100 or len(part.spans) == 1 for part in at.parts)
    assert all(len(a.tokens) + b.spans[0][1] > 100 for a, b in zip(at.parts, at.parts[1:], strict=False))


def products_of(kind: str) -> list[Product]:
    weights = torch.randn(EXPERTS, 48, SIZE)
    if kind == "int8":
        return [LinearW8A8(weight.mul(20).to(torch.int8), torch.rand(48)) for weight in weights]
    if kind == "w4":
        numbers = weights.mul(2).clamp(-8, 7).to(torch.int8)
        return [LinearW4A16(weight, torch.rand(48, 1), torch.zeros(48, 1)) for weight in numbers]
    return [Linear(weight.to(getattr(torch, kind))) for weight in weights]


def mixed(products: list[Product], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The sums [T, 48] of one product of each expert."""
    at = expert_spans(ids, EXPERTS, products[0].row_grain, products[0].least_rows)
    takes = products[0].takes
    rows = quantize_rows(x.clone()) if takes == torch.uint8 else Rows(x.to(takes))
    made = [ProductBySpan(products)(rows.at(part.tokens), part).dense() for part in at.parts]
    return WeightedSum()(made, weights, at.places)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "w4"])
def test_a_rows_bits_do_not_depend_on_who_shares_its_experts(kind: str) -> None:
    products, x, ids, weights = products_of(kind), torch.randn(300, SIZE), chosen(300, 3), torch.rand(300, 3)
    together = mixed(products, x, ids, weights)
    for first, end in ((0, 1), (3, 5), (3, 40), (100, 290), (299, 300)):
        part = slice(first, end)
        assert mixed(products, x[part], ids[part], weights[part]).equal(together[part])


@pytest.mark.parametrize("rows", range(1, 20))
def test_the_integer_product_is_exact_with_any_number_of_rows(rows: int) -> None:
    product = products_of("int8")[0]
    x = quantize_rows(torch.randn(40, SIZE))
    assert product(x.at(torch.arange(rows))).values.equal(product(x).values[:rows])


def test_the_sum_is_that_of_the_weighted_experts() -> None:
    weights, x = torch.randn(EXPERTS, 48, SIZE), torch.randn(21, SIZE)
    ids, shares = chosen(21, 4), torch.rand(21, 4)
    found = mixed([Linear(weight) for weight in weights], x, ids, shares)
    expected = torch.einsum("tk,tknd,td->tn", shares.double(), weights[ids].double(), x.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_has_the_bits_of_the_plain_one(dtype: torch.dtype) -> None:
    """In the order in which experts were chosen, in float32; also where rows were in the memory before."""
    summed = WeightedSum()
    for tokens, columns in ((90, 64), (7, 200), (120, 33)):
        ids, shares = chosen(tokens, 3), torch.rand(tokens, 3)
        at = expert_spans(ids, EXPERTS, 1, 1)
        y = torch.randn(len(at.tokens), columns).to(dtype)
        parts = list(y.split(50))
        assert summed(parts, shares, at.places).equal(experts.weighted_sum(y, shares, at.places))
