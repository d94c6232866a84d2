"""Granite 3 with experts (IBM 2024): Granite, with the matrices of all experts in one tensor."""

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import granite, llama
from batchinfer.models.families.mixtures import chosen_experts, with_experts
from batchinfer.models.families.variations import with_multipliers
from batchinfer.models.feed_forward import FeedForward, Router
from batchinfer.models.fused_experts import FusedExperts
from batchinfer.models.layer import Layer
from batchinfer.models.tensors import Matrix

ARCHITECTURES = ("GraniteMoeForCausalLM",)
DEFAULTS = granite.DEFAULTS | {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 11008}
FIXED = granite.FIXED
ends = granite.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    described = [with_fused_experts(layer, config) for layer in llama.layers(config.changed(layer_types=None))]
    return with_multipliers(described, config, config.number("attention_multiplier"))


def with_fused_experts(layer: Layer, config: ConfigFile, shared: FeedForward | None = None) -> Layer:
    """Replace the feed-forward block by experts of size `intermediate_size`."""
    count, name = config.size("num_local_experts"), "block_sparse_moe"
    hidden, inner = config.size("hidden_size"), config.size("intermediate_size")
    router = Router(Matrix(f"{name}.router.layer", count, hidden), chosen_experts(config, count))
    fused = FusedExperts(f"{name}.input_linear.weight", f"{name}.output_linear.weight", only_form=True)
    return with_experts(layer, router, count, inner, name=name, shared=shared, fused=fused)
