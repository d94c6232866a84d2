"""Compares the choice of experts with transformers' routers."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from batchinfer.kernels.experts import route

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
