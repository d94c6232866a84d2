"""`Mixing`: what a layer's mixer makes of the products before it in calibration: attention, or a recurrence."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.kv_cache import CPU, rotate
from batchinfer.kernels.norm import NormWeights, norm, rms_norm
from batchinfer.kernels.processor import multiplied_in
from batchinfer.kernels.state_pool import StateBatch, StatePool
from batchinfer.models.config import ModelConfig
from batchinfer.models.mixer import Attention
from batchinfer.models.recurrent import recurrent_weights
from batchinfer.models.stored_layer import norm_weights
from batchinfer.models.tensors import Norm
from batchinfer.quantize.activations import Activations, to_bytes


class Mixing:
    """Computes mixers in `dtype`, of chunks of whole sequences. `chunks` holds the sequences' lengths."""

    def __init__(self, config: ModelConfig, chunks: list[list[int]], dtype: torch.dtype, folder: Path) -> None:
        """Take the folder for keys and values that later layers read."""
        self.config, self.chunks, self.dtype, self.folder = config, chunks, dtype, folder
        longest, attentions = max(map(max, chunks)), config.attentions
        self.angles = {attention.rope: attention.rope.tables(longest) for attention in attentions}
        growing = {attention.query_growth for attention in attentions}
        self.growth = {g: g.factors(longest)[:, None, None] for g in growing if g is not None}

    def mixed(self, number: int, made: Iterator[dict[str, Tensor]], tensors: dict[str, Tensor]) -> Iterator[Tensor]:
        """Yield the inputs of a layer's product `output` in chunks [T, K]; `made` are the products before it."""
        mixer = self.config.layers[number].mixer
        if isinstance(mixer, Attention):
            yield from self._attended(number, mixer, (found["qkv"] for found in made), tensors)
            return
        weights = recurrent_weights(mixer, lambda name, _: tensors[name], self.config.norm_eps)
        for found, lengths in zip(made, self.chunks, strict=True):
            pool = StatePool(len(lengths) + 1, weights.state, self.dtype, CPU)
            yield weights.mix(found, pool, StateBatch.of_prompts(lengths)).to(self.dtype)

    def sources(self, first: int) -> set[int | None]:
        """Return the layers whose keys and values are read by others, of those from `first` on."""
        mixers = [layer.mixer for layer in self.config.layers[first:]]
        return {mixer.source for mixer in mixers if isinstance(mixer, Attention)}

    def _attended(
        self, number: int, shape: Attention, heads: Iterable[Tensor], tensors: dict[str, Tensor]
    ) -> Iterator[Tensor]:
        """Yield attention's outputs of a layer in chunks [T, heads * head_dim]; `heads` are the outputs of its qkv.

        Keys and values that later layers read go to a file.
        """
        width, rows = 2 * shape.kv_heads * shape.head_dim, [sum(lengths) for lengths in self.chunks]
        read = (
            None if shape.source is None else iter(Activations(self.keys_file(shape.source), rows, width, self.dtype))
        )
        is_source = number in self.sources(number + 1)
        with self.keys_file(number).open("wb") if is_source else nullcontext() as kept:
            for qkv, lengths in zip(heads, self.chunks, strict=True):
                own = sum(matrix.rows for matrix in shape.matrices)
                qkv, gate = qkv[:, :own], qkv[:, own:]
                if shape.limit is not None:
                    qkv.clamp_(-shape.limit, shape.limit)
                q, kv = qkv[:, : shape.q.rows], qkv[:, shape.q.rows :]
                query = self._normed_and_rotated(q, lengths, shape, 0, tensors)
                seen = self._keys_values(kv, lengths, shape, tensors) if read is None else next(read)
                if kept is not None:
                    kept.write(to_bytes(seen))
                mixed = self._attend(query, seen, lengths, shape, tensors)
                yield mixed if shape.gate is None else mixed * gate.sigmoid()

    def _keys_values(self, kv_TX: Tensor, lengths: list[int], shape: Attention, tensors: dict[str, Tensor]) -> Tensor:
        """Return the keys, then the values that attention sees, [T, 2 * kv_heads * head_dim]."""
        key, value = torch.split(kv_TX, [shape.k.rows, shape.v.rows], 1)
        key = self._normed_and_rotated(key, lengths, shape, 1, tensors)
        if shape.value_norm:
            value = rms_norm(value.reshape(len(value), -1, shape.head_dim), None, self.config.norm_eps).flatten(1)
        return torch.cat([key, value], 1)

    def _normed_and_rotated(
        self, x_TX: Tensor, lengths: list[int], shape: Attention, which: int, tensors: dict[str, Tensor]
    ) -> Tensor:
        """Return queries (`which` is 0) or keys (1) after their norms and rotary embedding, [T, heads * head_dim]."""
        positions = torch.cat([torch.arange(n) for n in lengths])
        cos, sin = (table[positions] for table in self.angles[shape.rope])

        def normed(x: Tensor) -> Tensor:
            if shape.head_norms is None:
                return x
            return norm(x, norm_of(shape.head_norms[which], tensors, self.dtype), self.config.norm_eps)

        if shape.normed_together:
            x_TX = normed(x_TX)
        x = x_TX.reshape(len(x_TX), -1, shape.head_dim)
        if shape.normed_after_rope:
            return normed(rotate(x, cos, sin)).flatten(1)
        return rotate(x if shape.normed_together else normed(x), cos, sin).flatten(1)

    def _attend(
        self, query_TX: Tensor, seen_TX: Tensor, lengths: list[int], shape: Attention, tensors: dict[str, Tensor]
    ) -> Tensor:
        """Return attention's outputs [T, heads * head_dim], computed one sequence at a time."""
        out = []
        for query, seen in zip(torch.split(query_TX, lengths), torch.split(seen_TX, lengths), strict=True):
            n, (key, value) = len(query), seen.chunk(2, 1)
            query, key, value = (x.reshape(n, -1, shape.head_dim) for x in (query, key, value))
            if shape.query_growth is not None:
                query = (query * self.growth[shape.query_growth][:n]).to(self.dtype)
            query, key, value = (x.transpose(0, 1).to(multiplied_in(self.dtype)) for x in (query, key, value))
            sinks = None if shape.sinks is None else tensors[shape.sinks].float()
            mixed = _attention(query, key, value, shape, sinks)
            out.append(mixed.transpose(0, 1).flatten(1).to(self.dtype))
        return torch.cat(out)

    def keys_file(self, layer: int) -> Path:
        """Return the file of the keys and values that other layers read of a layer."""
        return self.folder / f"keys-{layer:05}"


def norm_of(found: Norm, tensors: dict[str, Tensor], dtype: torch.dtype) -> NormWeights:
    """Return a norm's weights, from the layer's tensors by name."""
    return norm_weights(found, lambda name, shape: tensors[name], dtype, CPU)


def _attention(
    query_HTd: Tensor, key_KTd: Tensor, value_KTd: Tensor, shape: Attention, sinks_H: Tensor | None
) -> Tensor:
    """Return attention's outputs [heads, T, head_dim] of one sequence."""
    seen = _seen(query_HTd.shape[1], shape.window)
    if shape.softcap is None and sinks_H is None:
        query, key, value = query_HTd[None], key_KTd[None], value_KTd[None]
        return F.scaled_dot_product_attention(query, key, value, seen, scale=shape.scale, enable_gqa=True)[0]
    key, value = (x.repeat_interleave(shape.heads // shape.kv_heads, 0) for x in (key_KTd, value_KTd))
    scores = query_HTd @ key.transpose(1, 2) * shape.scale
    if shape.softcap is not None:
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
    scores = scores.masked_fill_(~seen, float("-inf"))
    if sinks_H is None:
        return scores.softmax(-1) @ value
    sinks = sinks_H.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ value


def _seen(length: int, window: int | None) -> Tensor:
    """Return a mask [length, length]: a position sees those up to itself, at most `window` of them."""
    positions = torch.arange(length)
    distance = positions[:, None] - positions
    return (distance >= 0) & (distance < (window or length))
