"""Ways in which layers differ from Llama's, each a function from a layer to a layer."""

from dataclasses import replace

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.feed_forward import Experts, FeedForward
from batchinfer.models.layer import Ends, Layer
from batchinfer.models.rope import no_rope
from batchinfer.models.tensors import Norm, joined


def with_fused_qkv(layer: Layer, name: str = "self_attn.qkv_proj") -> Layer:
    """Store the matrices q, k and v as one module, in this order."""
    a = layer.attention
    q, k, v = joined(name, a.q, a.k, a.v)
    return replace(layer, mixer=replace(a, q=q, k=k, v=v))


def with_heads_of_qkv(layer: Layer, name: str) -> Layer:
    """Store the matrices q, k and v as one module, by turns: a head of each, then the next head of each."""
    a, d = layer.attention, layer.attention.head_dim
    assert a.kv_heads == a.heads
    plain = tuple(range(d))
    q, k, v = (
        replace(matrix, name=name, first=i * d, module_rows=a.width, order=matrix.order or plain, head_rows=3 * d)
        for i, matrix in enumerate((a.q, a.k, a.v))
    )
    return replace(layer, mixer=replace(a, q=q, k=k, v=v))


def with_fused_gate_up(layer: Layer, name: str = "mlp.gate_up_proj") -> Layer:
    """Store the matrices gate and up as one module, in this order."""
    return replace(layer, feed_forward=fused_block(layer.block, name))


def fused_block(block: FeedForward, name: str) -> FeedForward:
    """Store the matrices gate and up of a block as one module, in this order."""
    assert block.gate is not None
    gate, up = joined(name, block.gate, block.up)
    return replace(block, gate=gate, up=up)


def with_pairs_of_neighbours(layer: Layer) -> Layer:
    """Rotate pairs of neighbours, not of halves."""
    order = layer.attention.rope.order(interleaved=True)
    a = layer.attention
    return replace(layer, mixer=replace(a, q=replace(a.q, order=order), k=replace(a.k, order=order)))


def without_rope(layer: Layer) -> Layer:
    """Rotate nothing."""
    a = layer.attention
    return replace(layer, mixer=replace(a, rope=no_rope(a.head_dim)))


def without_gate(layer: Layer, activation: str) -> Layer:
    """Apply the activation to what goes up, which no gate multiplies."""
    return replace(layer, feed_forward=replace(layer.block, gate=None, activation=activation))


def with_names(layer: Layer, output: str, up: str, down: str) -> Layer:
    """Give attention's output matrix and the two of a feed-forward block without a gate other names."""
    a, f = layer.attention, layer.block
    return replace(
        layer,
        mixer=replace(a, output=replace(a.output, name=output)),
        feed_forward=replace(f, up=replace(f.up, name=up), down=replace(f.down, name=down)),
    )


def with_output_bias(layer: Layer, bias: bool) -> Layer:
    """Set whether attention's output projection has a bias."""
    a = layer.attention
    return replace(layer, mixer=replace(a, output=replace(a.output, bias=bias)))


def with_residual_factor(layer: Layer, factor: float) -> Layer:
    """Multiply by a factor what is added to the residual stream."""
    a = layer.attention
    if layer.attention_norm is not None and layer.mlp_output_norm is not None:
        norms = replace(layer.attention_norm, factor=factor), replace(layer.mlp_output_norm, factor=factor)
        return replace(layer, attention_norm=norms[0], mlp_output_norm=norms[1])
    return replace(
        layer,
        mixer=replace(a, output=replace(a.output, factor=factor)),
        feed_forward=_multiplied(layer.feed_forward, factor),
    )


def with_output_norms(layer: Layer, attention: str, mlp: str) -> Layer:
    """Normalize the outputs of both blocks before they are added to the residual stream."""
    hidden = layer.attention.output.rows
    return replace(layer, attention_norm=Norm(attention, hidden), mlp_output_norm=Norm(mlp, hidden))


def with_output_norms_only(layer: Layer) -> Layer:
    """Normalize the outputs of both blocks, not their inputs, as OLMo 2 does."""
    normed = with_output_norms(layer, "post_attention_layernorm", "post_feedforward_layernorm")
    return replace(normed, input_norm=None, mlp_norm=None)


def layer_norm(norm: Norm | None, weight: bool = True, bias: bool = True) -> Norm:
    """Return a LayerNorm in the place of a norm, with a weight and a bias or without."""
    assert norm is not None
    return replace(norm, centered=True, weight=weight, bias=bias)


def with_layer_norms(layer: Layer, weight: bool = True, bias: bool = True) -> Layer:
    """Normalize the inputs of both blocks by LayerNorm, with weights and biases or without."""
    before, between = (layer_norm(norm, weight, bias) for norm in (layer.input_norm, layer.mlp_norm))
    return replace(layer, input_norm=before, mlp_norm=between)


def layer_norm_ends(config: ConfigFile, eps: str = "layer_norm_eps", bias: bool = True) -> Ends:
    """End with a LayerNorm; the field `eps` is that of all norms."""
    norm = Norm("model.norm", config.size("hidden_size"))
    return Ends(layer_norm(norm, bias=bias), config.number(eps))


def in_parallel(layer: Layer) -> Layer:
    """Let the feed-forward block take what attention takes, after the same norm."""
    return replace(layer, mlp_norm=layer.input_norm, parallel=True)


def with_head_norms(layer: Layer, query: Norm, key: Norm) -> Layer:
    """Normalize each head of queries and keys before rotary embedding."""
    a = layer.attention
    return replace(layer, mixer=replace(a, head_norms=_ordered((query, key), a.q.order)))


def with_norms_of_all_heads(layer: Layer) -> Layer:
    """Normalize queries and keys before rotary embedding, each over all of its heads together."""
    a = layer.attention
    norms = (Norm("self_attn.q_norm", a.q.rows), Norm("self_attn.k_norm", a.k.rows))
    return replace(layer, mixer=replace(a, head_norms=_ordered(norms, a.q.order)))


_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "relu2": "relu2", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip


def read_activation(config: ConfigFile) -> str:
    """Return the activation that `hidden_act` names. Raises `ValueError` for one that is not supported."""
    name = config.get("hidden_act")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act is {name!r}; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def with_multipliers(layers: list[Layer], config: ConfigFile, scale: float) -> list[Layer]:
    """Apply Granite's multipliers: `scale` of the scores, and the factor of what is added to the residual stream."""
    factor = config.number("residual_multiplier")
    scaled = [replace(layer, mixer=replace(layer.attention, scale=scale)) for layer in layers]
    return [with_residual_factor(layer, factor) for layer in scaled]


def multiplied_ends(config: ConfigFile, logits_factor: float) -> Ends:
    """Multiply embeddings by `embedding_multiplier`, and logits by this factor."""
    factor = config.number("embedding_multiplier")
    return replace(llama.ends(config), embedding_factor=factor, logits_factor=logits_factor)


def _multiplied(f: FeedForward | Experts, factor: float) -> FeedForward | Experts:
    if isinstance(f, FeedForward):
        return replace(f, down=replace(f.down, factor=factor))
    shared = None if f.shared is None else replace(f.shared, down=replace(f.shared.down, factor=factor))
    return replace(f, router=replace(f.router, factor=f.router.factor * factor), shared=shared)


def _ordered(norms: tuple[Norm, Norm], order: tuple[int, ...] | None) -> tuple[Norm, Norm]:
    return replace(norms[0], order=order), replace(norms[1], order=order)
