"""Compares the choice of experts with transformers' routers, and the products of rows alone and among others."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from batchinfer.kernels.experts import ProductBySpan, expert_spans, route, weighted_sum
from batchinfer.kernels.grain import MIN_ROWS
from batchinfer.kernels.linear import Linear
from batchinfer.kernels.linear_w8a8 import LinearW8A8
from batchinfer.kernels.product import Product
from batchinfer.kernels.rows import Rows, quantize_rows

EXPERTS, SIZE = 12, 32


def compare(router: Any, **how: Any) -> None:
    for tensor in router.state_dict().values():
        torch.nn.init.normal_(tensor)
    x = torch.randn(50, SIZE)
    logits = torch.nn.functional.linear(x, router.weight, getattr(router, "bias", None))
    with torch.no_grad():
        _, weights, ids = router(x)
        found_ids, found = route(logits, **how)
    assert found_ids.sort(-1).values.equal(ids.sort(-1).values)
    by_expert = (torch.zeros(50, EXPERTS).scatter_(1, *pair) for pair in ((found_ids, found), (ids, weights)))
    torch.testing.assert_close(*by_expert)


@pytest.mark.parametrize("normalized", [True, False])
def test_softmax_routing_is_that_of_qwen(normalized: bool) -> None:
    config = AutoConfig.for_model(
        "qwen2_moe", num_experts=EXPERTS, num_experts_per_tok=3, hidden_size=SIZE, norm_topk_prob=normalized
    )
    compare(Qwen2MoeTopKRouter(config), chosen=3, scores="softmax", normalized=normalized, factor=1.0)


def test_normalized_softmax_routing_is_a_softmax_of_the_chosen() -> None:
    config = AutoConfig.for_model("gpt_oss", num_local_experts=EXPERTS, num_experts_per_tok=4, hidden_size=SIZE)
    compare(GptOssTopKRouter(config), chosen=4, scores="softmax", normalized=True, factor=1.0)


@pytest.mark.parametrize(("groups", "best"), [(1, 1), (3, 2), (6, 3)])
@pytest.mark.parametrize("normalized", [True, False])
def test_sigmoid_routing_is_that_of_glm(groups: int, best: int, normalized: bool) -> None:
    config = AutoConfig.for_model(
        "glm4_moe", n_routed_experts=EXPERTS, num_experts_per_tok=4, hidden_size=SIZE, n_group=groups,
        topk_group=best, norm_topk_prob=normalized, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = Glm4MoeTopkRouter(config)
    how: dict[str, Any] = {"chosen": 4, "scores": "sigmoid", "normalized": normalized, "factor": 2.5}
    compare(router, **how, bias_E=router.e_score_correction_bias, groups=groups, chosen_groups=best)


def test_softmax_routing_with_a_bias_is_that_of_ernie() -> None:
    config = AutoConfig.for_model("ernie4_5_moe", moe_num_experts=EXPERTS, moe_k=3, hidden_size=SIZE)
    router = Ernie4_5_MoeTopKRouter(config)
    bias = router.moe_statics.e_score_correction_bias
    compare(router, chosen=3, scores="softmax", normalized=True, factor=1.0, bias_E=bias.detach()[0])


def chosen(tokens: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(tokens)])


@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (7, 2), (40, 3), (100, EXPERTS)])
def test_every_token_has_a_row_with_each_of_its_experts(tokens: int, k: int) -> None:
    experts = chosen(tokens, k)
    at = expert_spans(experts)
    owner = torch.full_like(at.tokens, -1)
    for expert, first, end in at.spans:
        assert (end - first) % MIN_ROWS == 0
        owner[first:end] = expert
    assert (owner >= 0).all() and len({expert for expert, _, _ in at.spans}) == len(at.spans)
    assert owner[at.places].equal(experts)
    assert at.tokens[at.places].equal(torch.arange(tokens)[:, None].expand(-1, k))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_rows_bits_do_not_depend_on_who_shares_its_experts(kind: str) -> None:
    weights = torch.randn(EXPERTS, 48, SIZE)
    products: list[Product] = (
        [LinearW8A8(weight.mul(20).to(torch.int8), torch.rand(48)) for weight in weights]
        if kind == "int8"
        else [Linear(weight.to(getattr(torch, kind))) for weight in weights]
    )
    x, experts, shares = torch.randn(90, SIZE), chosen(90, 3), torch.rand(90, 3)

    def mixed(tokens: slice) -> Tensor:
        at = expert_spans(experts[tokens])
        rows = x[tokens][at.tokens]
        inputs = quantize_rows(rows.clone()) if kind == "int8" else Rows(rows.to(getattr(torch, kind)))
        return weighted_sum(ProductBySpan(products)(inputs, at).dense(), shares[tokens], at.places)

    together = mixed(slice(0, 90))
    for first, end in ((0, 1), (3, 40), (89, 90)):
        assert mixed(slice(first, end)).equal(together[first:end])


def test_the_sum_is_that_of_the_weighted_experts() -> None:
    weights, x = torch.randn(EXPERTS, 48, SIZE), torch.randn(21, SIZE)
    experts, shares = chosen(21, 4), torch.rand(21, 4)
    at = expert_spans(experts)
    product = ProductBySpan([Linear(weight) for weight in weights])
    found = weighted_sum(product(Rows(x[at.tokens]), at).dense(), shares, at.places)
    expected = torch.einsum("tk,tknd,td->tn", shares.double(), weights[experts].double(), x.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)
