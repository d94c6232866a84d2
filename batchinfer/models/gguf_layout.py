"""The names and forms of a model's tensors in a GGUF file: the description of the same layers, as that file has them.

A family describes how a checkpoint in the Hugging Face layout stores its layers. Here each part gets the name of its
tensor in the file, and loses what the checkpoint's form asked for: GGUF files hold the matrices of experts apart, each
kind in one tensor for all of them, and halves or heads never by turns.
"""

from collections.abc import Container
from dataclasses import dataclass, replace

from batchinfer.models.config import ModelConfig
from batchinfer.models.feed_forward import Experts, FeedForward
from batchinfer.models.layer import Layer
from batchinfer.models.mixer import Attention, GatedDeltaNet, Mixer, ShortConvolution
from batchinfer.models.per_layer import PerLayerBlock
from batchinfer.models.tensors import Matrix, Norm, joined


def in_gguf(model: ModelConfig, names: Container[str], interleaved: bool) -> ModelConfig:
    """Return the config of a model whose file has tensors of these names.

    `interleaved` says that rows of queries and keys are in the order in which rotary embedding pairs neighbours.
    """
    norm = "output_norm" if "output_norm.weight" in names else "token_embd_norm"
    ends = replace(model.ends, norm=replace(model.norm, name=norm))
    if (made := ends.per_layer) is not None:
        ends = replace(
            ends,
            per_layer=replace(
                made,
                table=replace(made.table, name="per_layer_token_embd"),
                projection=replace(made.projection, name="per_layer_model_proj"),
                norm=replace(made.norm, name="per_layer_proj_norm"),
            ),
        )
    return replace(
        model,
        embedding=replace(model.embedding, name="token_embd"),
        head=replace(model.head, name="output"),
        ends=ends,
        layers=tuple(
            _LayerInFile(f"blk.{i}.", names, interleaved).layer(layer) for i, layer in enumerate(model.layers)
        ),
    )


def expert_tensor(name: str) -> tuple[str, int] | None:
    """Return (tensor of all experts, number of the expert) from the name of an expert's tensor; None for others."""
    module, _, end = name.rpartition(".")
    stacked, _, number = module.rpartition(".")
    return (f"{stacked}.{end}", int(number)) if stacked.endswith("_exps") else None


@dataclass(frozen=True)
class _LayerInFile:
    """One layer of a file."""

    prefix: str  # beginning of its tensors' names
    names: Container[str]  # of all tensors of the file
    interleaved: bool

    def has(self, module: str) -> bool:
        return f"{self.prefix}{module}.weight" in self.names

    def layer(self, layer: Layer) -> Layer:
        f, a = layer.feed_forward, layer.mixer
        # The norm before a feed-forward block has two names. If another norm has the second one, it has the first.
        before = "ffn_norm" if self.has("ffn_norm") or layer.attention_norm is not None else "post_attention_norm"
        shared = layer.mlp_norm is not None and layer.mlp_norm == layer.input_norm
        reads = isinstance(a, Attention) and a.source is not None
        return replace(
            layer,
            prefix=self.prefix,
            mixer=self._mixer(a),
            feed_forward=self._experts(f) if isinstance(f, Experts) else self._block(f),
            input_norm=_named(layer.input_norm, "attn_norm"),
            attention_norm=_named(layer.attention_norm, "post_attention_norm"),
            mlp_norm=_named(layer.mlp_norm, "attn_norm" if shared else before),
            mlp_output_norm=_named(layer.mlp_output_norm, "post_ffw_norm"),
            per_layer=None if layer.per_layer is None else _per_layer(layer.per_layer),
            scalar=None if layer.scalar is None else "layer_output_scale.weight",
            unread=("attn_k.", "attn_v.", "attn_k_norm.") if reads else (),
        )

    def _mixer(self, mixer: Mixer) -> Mixer:
        if isinstance(mixer, Attention):
            return self._attention(mixer)
        if isinstance(mixer, ShortConvolution):
            b, c, x = (replace(part, name="shortconv.in_proj") for part in mixer.bcx)
            taps = replace(mixer.taps, name="shortconv.conv.weight")
            return replace(mixer, bcx=(b, c, x), output=_plain(mixer.output, "shortconv.out_proj"), taps=taps)
        return self._delta_net(mixer)

    def _attention(self, a: Attention) -> Attention:
        order = a.rope.order(self.interleaved)
        if a.gate is not None:  # its rows and those of the queries lie by turns, as in checkpoints
            q, gate = replace(a.q, name="attn_q"), replace(a.gate, name="attn_q")
        else:
            q, gate = _plain(a.q, "attn_q", order), None
        k = _plain(a.k, "attn_k", order)
        v = _plain(a.v, "attn_k" if a.v.name == a.k.name != a.q.name else "attn_v")
        if self.has("attn_qkv"):
            q, k, v = joined("attn_qkv", q, k, v)
        norms = a.head_norms
        if norms is not None:
            query, key = (replace(norm, modules=(), order=order) for norm in norms)
            norms = replace(query, name="attn_q_norm"), replace(key, name="attn_k_norm")
        sinks = None if a.sinks is None else "attn_sinks.weight"
        output = _plain(a.output, "attn_output")
        return replace(a, q=q, k=k, v=v, gate=gate, output=output, head_norms=norms, sinks=sinks)

    def _delta_net(self, mixer: GatedDeltaNet) -> GatedDeltaNet:
        q, k, v = joined("attn_qkv", *(_plain(part, "attn_qkv") for part in mixer.qkv))
        if self.has("ssm_ba"):  # by heads of keys, as in checkpoints
            b, a = (replace(part, name="ssm_ba") for part in mixer.rates)
        else:
            b, a = _plain(mixer.rates[0], "ssm_beta"), _plain(mixer.rates[1], "ssm_alpha")
        return replace(
            mixer,
            qkv=(q, k, v),
            z=_plain(mixer.z, "attn_gate"),
            rates=(b, a),
            output=_plain(mixer.output, "ssm_out"),
            taps=replace(mixer.taps, name="ssm_conv1d.weight"),
            decay_log=replace(mixer.decay_log, name="ssm_a"),
            decay_bias=replace(mixer.decay_bias, name="ssm_dt.bias"),
            norm=replace(mixer.norm, name="ssm_norm"),
        )

    def _experts(self, f: Experts) -> Experts:
        r = f.router
        bias = None if r.bias is None else "exp_probs_b.bias"
        gate = f.shared_gate
        return replace(
            f,
            router=replace(r, matrix=_plain(r.matrix, "ffn_gate_inp"), bias=bias),
            experts=tuple(self._block(expert, "_exps", f".{i}") for i, expert in enumerate(f.experts)),
            shared=None if f.shared is None else self._block(f.shared, "_shexp"),
            shared_gate=None if gate is None else _plain(gate, "ffn_gate_inp_shexp"),
        )

    def _block(self, f: FeedForward, kind: str = "", number: str = "") -> FeedForward:
        """Describe a block of a kind, or the expert of a number, of which the file says no more than the tensors do."""
        gate, up = f.gate, _plain(f.up, f"ffn_up{kind}{number}")
        if gate is not None:
            gate = _plain(gate, f"ffn_gate{kind}{number}")
            if not self.has(f"ffn_gate{kind}"):
                both = f"ffn_gate_up{kind}" if self.has(f"ffn_gate_up{kind}") else f"ffn_up{kind}"
                gate, up = joined(f"{both}{number}", gate, up)
        return replace(f, gate=gate, up=up, down=_plain(f.down, f"ffn_down{kind}{number}"))


def _per_layer(block: PerLayerBlock) -> PerLayerBlock:
    gate, projection = _plain(block.gate, "inp_gate"), _plain(block.projection, "proj")
    return replace(block, gate=gate, projection=projection, norm=replace(block.norm, name="post_norm"))


def _named(norm: Norm | None, name: str) -> Norm | None:
    return None if norm is None else replace(norm, name=name)


def _plain(matrix: Matrix, name: str, order: tuple[int, ...] | None = None) -> Matrix:
    """Return the same matrix as a module of its own."""
    return Matrix(name, matrix.rows, matrix.columns, matrix.bias, factor=matrix.factor, order=order)
