"""Ways in which layers differ from Llama's, each a function from a layer to a layer."""

from dataclasses import replace

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.layer import Ends, Layer, Matrix, Norm
from batchinfer.models.rope import no_rope


def with_fused_qkv(layer: Layer, name: str = "self_attn.qkv_proj") -> Layer:
    """Store the matrices q, k and v as one module, in this order."""
    a = layer.attention
    q, k, v = _stacked(name, a.q, a.k, a.v)
    return replace(layer, mixer=replace(a, q=q, k=k, v=v))


def with_fused_gate_up(layer: Layer, name: str = "mlp.gate_up_proj") -> Layer:
    """Store the matrices gate and up as one module, in this order."""
    f = layer.feed_forward
    assert f.gate is not None
    gate, up = _stacked(name, f.gate, f.up)
    return replace(layer, feed_forward=replace(f, gate=gate, up=up))


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
    return replace(layer, feed_forward=replace(layer.feed_forward, gate=None, activation=activation))


def with_output_bias(layer: Layer, bias: bool) -> Layer:
    """Set whether attention's output projection has a bias."""
    a = layer.attention
    return replace(layer, mixer=replace(a, output=replace(a.output, bias=bias)))


def with_residual_factor(layer: Layer, factor: float) -> Layer:
    """Multiply by a factor what is added to the residual stream."""
    a, f = layer.attention, layer.feed_forward
    if layer.attention_norm is not None and layer.mlp_output_norm is not None:
        norms = replace(layer.attention_norm, factor=factor), replace(layer.mlp_output_norm, factor=factor)
        return replace(layer, attention_norm=norms[0], mlp_output_norm=norms[1])
    return replace(
        layer,
        mixer=replace(a, output=replace(a.output, factor=factor)),
        feed_forward=replace(f, down=replace(f.down, factor=factor)),
    )


def with_output_norms(layer: Layer, attention: str, mlp: str) -> Layer:
    """Normalize the outputs of both blocks before they are added to the residual stream."""
    hidden = layer.attention.output.rows
    return replace(layer, attention_norm=Norm(attention, hidden), mlp_output_norm=Norm(mlp, hidden))


def with_output_norms_only(layer: Layer) -> Layer:
    """Normalize the outputs of both blocks, not their inputs, as OLMo 2 does."""
    normed = with_output_norms(layer, "post_attention_layernorm", "post_feedforward_layernorm")
    return replace(normed, input_norm=None, mlp_norm=None)


def with_norms_of_all_heads(layer: Layer) -> Layer:
    """Normalize queries and keys before rotary embedding, each over all of its heads together."""
    a = layer.attention
    norms = (Norm("self_attn.q_norm", a.q.rows), Norm("self_attn.k_norm", a.k.rows))
    return replace(layer, mixer=replace(a, head_norms=_ordered(norms, a.q.order)))


def with_multipliers(layers: list[Layer], config: ConfigFile, scale: float) -> list[Layer]:
    """Apply Granite's multipliers: `scale` of the scores, and the factor of what is added to the residual stream."""
    factor = config.number("residual_multiplier")
    scaled = [replace(layer, mixer=replace(layer.attention, scale=scale)) for layer in layers]
    return [with_residual_factor(layer, factor) for layer in scaled]


def multiplied_ends(config: ConfigFile, logits_factor: float) -> Ends:
    """Multiply embeddings by `embedding_multiplier`, and logits by this factor."""
    norm = Norm("model.norm", config.size("hidden_size"))
    return Ends(norm, embedding_factor=config.number("embedding_multiplier"), logits_factor=logits_factor)


def _stacked(name: str, *matrices: Matrix) -> list[Matrix]:
    rows = sum(matrix.rows for matrix in matrices)
    firsts = [sum(before.rows for before in matrices[:i]) for i in range(len(matrices))]
    return [
        replace(matrix, name=name, first=first, module_rows=rows)
        for matrix, first in zip(matrices, firsts, strict=True)
    ]


def _ordered(norms: tuple[Norm, Norm], order: tuple[int, ...] | None) -> tuple[Norm, Norm]:
    return replace(norms[0], order=order), replace(norms[1], order=order)
