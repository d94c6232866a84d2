"""Qwen3-Next (Qwen Team 2025): Qwen3.5 with the matrices of a DeltaNet packed by heads of keys, and with experts."""

from dataclasses import replace
from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import qwen2_moe, qwen3_5_text
from batchinfer.models.families.mixtures import number_of_experts
from batchinfer.models.layer import Layer
from batchinfer.models.mixer import GatedDeltaNet
from batchinfer.models.tensors import Matrix

ARCHITECTURES = ("Qwen3NextForCausalLM",)
DEFAULTS: dict[str, Any] = qwen3_5_text.DEFAULTS | {
    "num_key_value_heads": 2, "num_experts": 512, "num_experts_per_tok": 10, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": None, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "intermediate_size": 5632,
}  # fmt: skip
FIXED, ends = qwen3_5_text.FIXED, qwen3_5_text.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    described = qwen3_5_text.hybrid(config, _packed(qwen3_5_text.delta_net(config)))
    if not config.whole("num_experts"):
        return described
    router = qwen2_moe.router(config, number_of_experts(config, 512))
    return [
        qwen2_moe.with_shared_expert(layer, config, router) if sparse else layer
        for layer, sparse in zip(described, qwen2_moe.with_mixture(config), strict=True)
    ]


def _packed(shape: GatedDeltaNet) -> GatedDeltaNet:
    """Store the rows of each head of queries and keys, and of the values that it serves, one behind the other."""
    q, k, v, z = _by_head("linear_attn.in_proj_qkvz", (*shape.qkv, shape.z), shape.key_heads)
    b, a = _by_head("linear_attn.in_proj_ba", shape.rates, shape.key_heads)
    return replace(shape, qkv=(q, k, v), z=z, rates=(b, a))


def _by_head(name: str, matrices: tuple[Matrix, ...], heads: int) -> list[Matrix]:
    """Store so many heads of these matrices in one module: all rows of the first head come first."""
    sizes = [matrix.rows // heads for matrix in matrices]
    return [
        replace(
            matrix,
            name=name,
            first=sum(sizes[:i]),
            module_rows=sum(sizes) * heads,
            order=tuple(range(sizes[i])),
            head_rows=sum(sizes),
        )
        for i, matrix in enumerate(matrices)
    ]
