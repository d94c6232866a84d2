"""`Calibration`: runs text through a model layer by layer, so that each matrix can be quantized for its own inputs.

The hidden states between two layers are kept in a file. So memory holds a few thousand tokens of one layer, however
much text there is, and an interrupted run can resume from the file. A matrix's inputs come from the quantized matrices
before it, so that it can correct their error.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.activation import activate
from batchinfer.kernels.kv_cache import rotate
from batchinfer.kernels.linear import linear
from batchinfer.kernels.norm import rms_norm
from batchinfer.kernels.processor import multiplied_in
from batchinfer.models.config import ModelConfig
from batchinfer.models.layer import Attention, Norm, PerLayerEmbeddings
from batchinfer.models.stored_layer import bias_of, norm_weight, weight_of

CHUNK_TOKENS = 2048
"""Approximate number of tokens that are computed together; a chunk consists of whole sequences."""


class Calibration:
    """Sequences of token ids and their hidden states before the current layer. Everything is computed in `dtype`."""

    def __init__(
        self, config: ModelConfig, sequences: list[NDArray[np.int32]], dtype: torch.dtype, folder: Path
    ) -> None:
        self.dtype, self.folder = dtype, folder
        self.token_ids = np.concatenate(sequences).astype(np.int64)
        self.chunks = _in_chunks([len(sequence) for sequence in sequences])
        longest = max(map(len, sequences))
        self.config = config.within(longest)
        self.angles = {rope: rope.tables(longest) for rope in {layer.attention.rope for layer in self.config.layers}}
        growing = {layer.attention.query_growth for layer in config.layers}
        self.growth = {g: g.factors(longest)[:, None, None] for g in growing if g is not None}

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences."""
        return len(self.token_ids)

    def begin(self, tensors: dict[str, Tensor]) -> None:
        """Compute and store the hidden states before the first layer, and the per-layer embeddings.

        `tensors` are those outside the layers, by name.
        """
        chunks = torch.split(torch.from_numpy(self.token_ids), [sum(lengths) for lengths in self.chunks])
        embedding = tensors[f"{self.config.embedding.name}.weight"]
        self._store(_states(0), (self._embedded(chunk, embedding) for chunk in chunks))
        if (shape := self.config.ends.per_layer) is not None:
            for i in range(len(self.config.layers)):
                made = map(self._per_layer_maker(i, shape, tensors), chunks, self._stored(_states(0)))
                self._store(_per_layer(i), made)

    def _per_layer_maker(
        self, layer: int, shape: PerLayerEmbeddings, tensors: dict[str, Tensor]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return what makes a layer's per-layer embeddings of tokens [T] and their states before the first layer."""
        first = layer * shape.size
        own = replace(shape.projection, first=first, rows=shape.size, module_rows=shape.projection.rows)
        projection = weight_of(own, tensors[f"{own.name}.weight"]).to(self.dtype)
        weight = norm_weight(shape.norm, tensors[f"{shape.norm.name}.weight"], self.dtype)
        table = tensors[f"{shape.table.name}.weight"]

        def made(tokens: Tensor, x_TD: Tensor) -> Tensor:
            found = table[tokens, first : first + shape.size].to(self.dtype) * shape.factor
            return found + rms_norm(linear(x_TD, projection), weight, self.config.norm_eps)

        return made

    def _embedded(self, tokens: Tensor, embedding_VD: Tensor) -> Tensor:
        return F.embedding(tokens, embedding_VD).to(self.dtype) * self.config.ends.embedding_factor

    def stages(self, number: int, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Iterator[Tensor]]]:
        """Yield the matrix products of layer `number` in order: (name, inputs in chunks [T, K]).

        `tensors` are the layer's tensors by name, without its prefix. Between two products the caller may replace the
        first one's weights in `tensors`: the inputs that follow are computed with the new ones. After the last product
        the states before the next layer are stored.
        """

        layer = self.config.layers[number]

        def product(name: str) -> Callable[[Tensor], Tensor]:
            matrices = layer.products[name]
            weights = [weight_of(matrix, tensors[f"{matrix.name}.weight"]).to(self.dtype) for matrix in matrices]
            biases = [bias_of(m, tensors[f"{m.name}.bias"]).to(self.dtype) for m in matrices if m.bias]
            return partial(linear, weight_NK=torch.cat(weights), bias_N=torch.cat(biases) if biases else None)

        def normed(states: Iterable[Tensor], norm: Norm | None) -> Iterator[Tensor]:
            if norm is None:
                return iter(states)
            weight = norm_weight(norm, tensors[f"{norm.name}.weight"], self.dtype)
            return (rms_norm(x, weight, self.config.norm_eps) for x in states)

        def added(states: Iterable[Tensor], inputs: Iterable[Tensor], name: str, norm: Norm | None) -> Iterator[Tensor]:
            return (x + y for x, y in zip(states, normed(map(product(name), inputs), norm), strict=True))

        entering = self._stored(_states(number))
        yield "qkv", normed(entering, layer.input_norm)
        heads = map(product("qkv"), normed(entering, layer.input_norm))
        mixed = self._store("mixed", self._attended(number, heads, tensors))
        yield "output", iter(mixed)
        middle = self._store("middle", added(entering, mixed, "output", layer.attention_norm))
        yield "gate_up", normed(middle, layer.mlp_norm)
        f = layer.feed_forward
        act = partial(activate, activation=f.activation, gated=f.gate is not None)
        inner = self._store("inner", map(act, map(product("gate_up"), normed(middle, layer.mlp_norm))))
        yield "down", iter(inner)
        leaving = added(middle, inner, "down", layer.mlp_output_norm)
        if (p := layer.per_layer) is not None:
            behind = self._store("behind", leaving)
            yield "per_layer_gate", iter(behind)
            gates = map(product("per_layer_gate"), behind)
            pairs = (torch.cat(pair, 1) for pair in zip(gates, self._stored(_per_layer(number)), strict=True))
            gated = self._store("gated", map(partial(activate, activation=p.activation, gated=True), pairs))
            yield "per_layer_projection", iter(gated)
            leaving = added(behind, gated, "per_layer_projection", p.norm)
        if layer.scalar is not None:
            leaving = (x * tensors[layer.scalar].to(self.dtype) for x in leaving)
        self._store(_states(number + 1), leaving)

    def leave(self, layer: int) -> None:
        """Delete what the layers from this one on do not need any more."""
        names = [_states(layer), _per_layer(layer)]
        if layer >= 0 and (source := self.config.layers[layer].attention.source) is not None:
            names += [] if source in self._sources(layer + 1) else [_keys(source)]
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def _sources(self, first: int) -> set[int | None]:
        """Return the layers whose keys and values are read by others, of those from `first` on."""
        return {layer.attention.source for layer in self.config.layers[first:]}

    def _attended(self, number: int, heads: Iterable[Tensor], tensors: dict[str, Tensor]) -> Iterator[Tensor]:
        """Yield attention's outputs of a layer in chunks [T, heads * head_dim]; `heads` are the outputs of its qkv.

        Keys and values that later layers read go to a file.
        """
        shape = self.config.layers[number].attention
        read = None if shape.source is None else iter(self._stored(_keys(shape.source)))
        is_source = number in self._sources(number + 1)
        with (self.folder / _keys(number)).open("wb") if is_source else nullcontext() as kept:
            for qkv, lengths in zip(heads, self.chunks, strict=True):
                q, kv = qkv[:, : shape.q.rows], qkv[:, shape.q.rows :]
                query = self._normed_and_rotated(q, lengths, shape, 0, tensors)
                seen = self._keys_values(kv, lengths, shape, tensors) if read is None else next(read)
                if kept is not None:
                    kept.write(_bytes(seen))
                yield self._attend(query, seen, lengths, shape)

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
        x = x_TX if shape.normed_together else x_TX.reshape(len(x_TX), -1, shape.head_dim)
        if shape.head_norms is not None:
            norm = shape.head_norms[which]
            x = rms_norm(x, norm_weight(norm, tensors[f"{norm.name}.weight"], self.dtype), self.config.norm_eps)
        x = x.reshape(len(x_TX), -1, shape.head_dim)
        positions = torch.cat([torch.arange(n) for n in lengths])
        cos, sin = self.angles[shape.rope]
        return rotate(x, cos[positions], sin[positions]).flatten(1)

    def _attend(self, query_TX: Tensor, seen_TX: Tensor, lengths: list[int], shape: Attention) -> Tensor:
        """Return attention's outputs [T, heads * head_dim], computed one sequence at a time."""
        out = []
        for query, seen in zip(torch.split(query_TX, lengths), torch.split(seen_TX, lengths), strict=True):
            n, (key, value) = len(query), seen.chunk(2, 1)
            query, key, value = (x.reshape(n, -1, shape.head_dim) for x in (query, key, value))
            if shape.query_growth is not None:
                query = (query * self.growth[shape.query_growth][:n]).to(self.dtype)
            query, key, value = (x.transpose(0, 1).to(multiplied_in(self.dtype)) for x in (query, key, value))
            mixed = _attention(query, key, value, shape)
            out.append(mixed.transpose(0, 1).flatten(1).to(self.dtype))
        return torch.cat(out)

    def _store(self, name: str, chunks_TX: Iterable[Tensor]) -> "_Activations":
        unfinished = self.folder / f"{name}.unfinished"
        with unfinished.open("wb") as file:
            for chunk in chunks_TX:
                file.write(_bytes(chunk))
        unfinished.replace(self.folder / name)
        return self._stored(name)

    def _stored(self, name: str) -> "_Activations":
        return _Activations(self.folder / name, [sum(lengths) for lengths in self.chunks], self.dtype)


@dataclass(frozen=True)
class _Activations:
    """Rows stored one after the other in a file, which are read in chunks."""

    path: Path
    chunks: list[int]  # number of rows of each chunk
    dtype: torch.dtype

    def __iter__(self) -> Iterator[Tensor]:
        a_row = self.path.stat().st_size // sum(self.chunks)
        with self.path.open("rb") as file:
            for rows in self.chunks:
                values = torch.from_numpy(np.fromfile(file, np.uint8, rows * a_row))
                yield values.view(self.dtype).view(rows, -1)


def _states(layer: int) -> str:
    """Name the file of the hidden states before a layer."""
    return f"states-{layer:05}"


def _per_layer(layer: int) -> str:
    """Name the file of a layer's per-layer embeddings."""
    return f"per-layer-{layer:05}"


def _keys(layer: int) -> str:
    """Name the file of the keys and values that other layers read of a layer."""
    return f"keys-{layer:05}"


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def _attention(query_HTd: Tensor, key_KTd: Tensor, value_KTd: Tensor, shape: Attention) -> Tensor:
    """Return attention's outputs [heads, T, head_dim] of one sequence."""
    seen = _seen(query_HTd.shape[1], shape.window)
    if shape.softcap is None:
        query, key, value = query_HTd[None], key_KTd[None], value_KTd[None]
        return F.scaled_dot_product_attention(query, key, value, seen, scale=shape.scale, enable_gqa=True)[0]
    key, value = (x.repeat_interleave(shape.heads // shape.kv_heads, 0) for x in (key_KTd, value_KTd))
    scores = torch.tanh(query_HTd @ key.transpose(1, 2) * (shape.scale / shape.softcap)) * shape.softcap
    return scores.masked_fill_(~seen, float("-inf")).softmax(-1) @ value


def _seen(length: int, window: int | None) -> Tensor:
    """Return a mask [length, length]: a position sees those up to itself, at most `window` of them."""
    positions = torch.arange(length)
    distance = positions[:, None] - positions
    return (distance >= 0) & (distance < (window or length))


def _in_chunks(lengths: list[int]) -> list[list[int]]:
    """Split the sequences' lengths into chunks of about `CHUNK_TOKENS` tokens, in order."""
    chunks: list[list[int]] = [[]]
    for length in lengths:
        if sum(chunks[-1]) + length > CHUNK_TOKENS and chunks[-1]:
            chunks.append([])
        chunks[-1].append(length)
    return chunks
