"""`Calibration`: runs text through a model layer by layer, so that each matrix can be quantized for its own inputs.

The hidden states between two layers are kept in a file. So memory holds a few thousand tokens of one layer, however
much text there is, and an interrupted run can resume from the file. A matrix's inputs come from the quantized matrices
before it, so that it can correct their error.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.activation import activate
from batchinfer.kernels.experts import route
from batchinfer.kernels.kv_cache import CPU, rotate
from batchinfer.kernels.linear import linear
from batchinfer.kernels.norm import NormWeights, norm, rms_norm
from batchinfer.kernels.processor import multiplied_in
from batchinfer.kernels.state_pool import StateBatch, StatePool
from batchinfer.models.config import ModelConfig
from batchinfer.models.layer import Attention, Experts, FeedForward, Matrix, Norm, PerLayerEmbeddings
from batchinfer.models.recurrent import recurrent_weights
from batchinfer.models.stored_layer import bias_of, norm_weights, weight_of

CHUNK_TOKENS = 2048
"""Approximate number of tokens that are computed together; a chunk consists of whole sequences."""


class Stage(NamedTuple):
    """A matrix product that calibration comes to."""

    product: str  # its name in the layer's `products`
    rows: int  # number of its inputs, which are fewer than the tokens if only some choose an expert
    inputs: Iterator[Tensor]  # in chunks [T, K]


_Inputs = Callable[[], Iterator[Tensor]]
"""Returns the inputs of a block in chunks, from the first one on, each time that it is called."""


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
        self.angles = {rope: rope.tables(longest) for rope in {a.rope for a in self.config.attentions}}
        growing = {attention.query_growth for attention in config.attentions}
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
        weights = self._norm_weights(shape.norm, tensors)
        table = tensors[f"{shape.table.name}.weight"]

        def made(tokens: Tensor, x_TD: Tensor) -> Tensor:
            found = table[tokens, first : first + shape.size].to(self.dtype) * shape.factor
            return found + norm(linear(x_TD, projection), weights, self.config.norm_eps)

        return made

    def _embedded(self, tokens: Tensor, embedding_VD: Tensor) -> Tensor:
        return F.embedding(tokens, embedding_VD).to(self.dtype) * self.config.ends.embedding_factor

    def stages(self, number: int, tensors: dict[str, Tensor]) -> Iterator[Stage]:
        """Yield the matrix products of layer `number` in order.

        `tensors` are the layer's tensors by name, without its prefix. Between two products the caller may replace the
        first one's weights in `tensors`: the inputs that follow are computed with the new ones. After the last product
        the states before the next layer are stored.
        """

        layer = self.config.layers[number]

        def product(name: str) -> Callable[[Tensor], Tensor]:
            return _product(layer.products[name], tensors, self.dtype)

        def normed(states: Iterable[Tensor], found: Norm | None) -> Iterator[Tensor]:
            if found is None:
                return iter(states)
            weights = self._norm_weights(found, tensors)
            return (norm(x, weights, self.config.norm_eps) for x in states)

        def added(states: Iterable[Tensor], outputs: Iterable[Tensor], found: Norm | None) -> Iterator[Tensor]:
            return (x + y for x, y in zip(states, normed(outputs, found), strict=True))

        entering = self._stored(_states(number))
        entered = [name for name in layer.mixer.products if name != "output"]
        for name in entered:
            yield Stage(name, self.tokens, normed(entering, layer.input_norm))
        made = zip(*(map(product(name), normed(entering, layer.input_norm)) for name in entered), strict=True)
        by_name = (dict(zip(entered, parts, strict=True)) for parts in made)
        mixed = self._store("mixed", self._mixed(number, by_name, tensors))
        yield Stage("output", self.tokens, iter(mixed))
        middle = self._store("middle", added(entering, map(product("output"), mixed), layer.attention_norm))
        before = entering if layer.parallel else middle

        def inputs() -> Iterator[Tensor]:
            return normed(before, layer.mlp_norm)

        f = layer.feed_forward
        walk = self._block(f, "", product, inputs) if isinstance(f, FeedForward) else self._experts(f, tensors, inputs)
        outputs = yield from walk
        leaving = added(middle, outputs, layer.mlp_output_norm)
        if (p := layer.per_layer) is not None:
            behind = self._store("behind", leaving)
            yield Stage("per_layer_gate", self.tokens, iter(behind))
            gates = map(product("per_layer_gate"), behind)
            vectors = self._stored(_per_layer(number), p.gate.rows)
            pairs = (torch.cat(pair, 1) for pair in zip(gates, vectors, strict=True))
            gated = self._store("gated", map(partial(activate, activation=p.activation, gated=True), pairs))
            yield Stage("per_layer_projection", self.tokens, iter(gated))
            leaving = added(behind, map(product("per_layer_projection"), gated), p.norm)
        if layer.scalar is not None:
            leaving = (x * tensors[layer.scalar].to(self.dtype) for x in leaving)
        self._store(_states(number + 1), leaving)
        for path in self.folder.glob("*expert*"):
            path.unlink()

    def _block(
        self, f: FeedForward, of: str, product: Callable[[str], Callable[[Tensor], Tensor]], inputs: _Inputs
    ) -> Generator[Stage, None, Iterator[Tensor]]:
        """Yield the products of a feed-forward block, whose names begin with `of`; return its outputs in chunks."""
        rows = sum(map(len, inputs()))
        yield Stage(f"{of}gate_up", rows, inputs())
        act = partial(activate, activation=f.activation, gated=f.gate is not None)
        inner = self._store(f"{of}inner", map(act, map(product(f"{of}gate_up"), inputs())))
        yield Stage(f"{of}down", rows, iter(inner))
        return map(product(f"{of}down"), inner)

    def _experts(
        self, f: Experts, tensors: dict[str, Tensor], inputs: _Inputs
    ) -> Generator[Stage, None, Iterator[Tensor]]:
        """Yield the products of each expert with the tokens that chose it; return the mixture's outputs in chunks."""

        def product(name: str) -> Callable[[Tensor], Tensor]:
            return _product(f.products[name], tensors, self.dtype)

        def unquantized(matrix: Matrix) -> Callable[[Tensor], Tensor]:
            return _product((matrix,), tensors, torch.float32)

        r = f.router
        bias = None if r.bias is None else tensors[r.bias].float().flatten()
        scores = map(unquantized(r.matrix), (x.float() for x in inputs()))
        chosen = [route(x, r.chosen, r.scores, r.normalized, r.factor, bias, r.groups, r.chosen_groups) for x in scores]
        outputs = []
        for i, expert in enumerate(f.experts):
            found = self._store(
                f"expert {i}", (x[_rows_of(i, ids)] for x, (ids, _) in zip(inputs(), chosen, strict=True))
            )
            walk = yield from self._block(expert, f"expert {i} ", product, found.__iter__)
            outputs.append(self._store(f"expert {i}", walk))
        shared: Iterable[Tensor | None] = repeat(None, len(chosen))
        if f.shared is not None:
            walk = yield from self._block(f.shared, "shared expert ", product, inputs)
            shared = self._store("shared expert", walk)
            if f.shared_gate is not None:
                gates = map(unquantized(f.shared_gate), (x.float() for x in inputs()))
                shared = (x * gate.sigmoid().to(x.dtype) for x, gate in zip(shared, gates, strict=True))
        return map(_weighted_sum, chosen, zip(*outputs, strict=True), shared)

    def leave(self, layer: int) -> None:
        """Delete what the layers from this one on do not need any more."""
        names = [_states(layer), _per_layer(layer)]
        mixer = self.config.layers[layer].mixer if layer >= 0 else None
        if isinstance(mixer, Attention) and mixer.source is not None:
            names += [] if mixer.source in self._sources(layer + 1) else [_keys(mixer.source)]
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def _mixed(self, number: int, made: Iterator[dict[str, Tensor]], tensors: dict[str, Tensor]) -> Iterator[Tensor]:
        """Yield the inputs of a layer's product `output` in chunks [T, K]; `made` are the products before it."""
        mixer = self.config.layers[number].mixer
        if isinstance(mixer, Attention):
            yield from self._attended(number, mixer, (found["qkv"] for found in made), tensors)
            return
        weights = recurrent_weights(mixer, lambda name, _: tensors[name], self.config.norm_eps)
        for found, lengths in zip(made, self.chunks, strict=True):
            pool = StatePool(len(lengths) + 1, weights.state, self.dtype, CPU)
            yield weights.mix(found, pool, StateBatch.of_prompts(lengths)).to(self.dtype)

    def _sources(self, first: int) -> set[int | None]:
        """Return the layers whose keys and values are read by others, of those from `first` on."""
        mixers = [layer.mixer for layer in self.config.layers[first:]]
        return {mixer.source for mixer in mixers if isinstance(mixer, Attention)}

    def _attended(
        self, number: int, shape: Attention, heads: Iterable[Tensor], tensors: dict[str, Tensor]
    ) -> Iterator[Tensor]:
        """Yield attention's outputs of a layer in chunks [T, heads * head_dim]; `heads` are the outputs of its qkv.

        Keys and values that later layers read go to a file.
        """
        width = 2 * shape.kv_heads * shape.head_dim
        read = None if shape.source is None else iter(self._stored(_keys(shape.source), width))
        is_source = number in self._sources(number + 1)
        with (self.folder / _keys(number)).open("wb") if is_source else nullcontext() as kept:
            for qkv, lengths in zip(heads, self.chunks, strict=True):
                own = sum(matrix.rows for matrix in shape.matrices)
                qkv, gate = qkv[:, :own], qkv[:, own:]
                if shape.limit is not None:
                    qkv.clamp_(-shape.limit, shape.limit)
                q, kv = qkv[:, : shape.q.rows], qkv[:, shape.q.rows :]
                query = self._normed_and_rotated(q, lengths, shape, 0, tensors)
                seen = self._keys_values(kv, lengths, shape, tensors) if read is None else next(read)
                if kept is not None:
                    kept.write(_bytes(seen))
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
            return norm(x, self._norm_weights(shape.head_norms[which], tensors), self.config.norm_eps)

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

    def _norm_weights(self, found: Norm, tensors: dict[str, Tensor]) -> NormWeights:
        return norm_weights(found, lambda name, shape: tensors[name], self.dtype, torch.device("cpu"))

    def _store(self, name: str, chunks_TX: Iterable[Tensor]) -> "_Activations":
        unfinished, rows, columns = self.folder / f"{name}.unfinished", [], 0
        with unfinished.open("wb") as file:
            for chunk in chunks_TX:
                file.write(_bytes(chunk))
                rows.append(len(chunk))
                columns = chunk.shape[1]
        unfinished.replace(self.folder / name)
        return _Activations(self.folder / name, rows, columns, self.dtype)

    def _stored(self, name: str, columns: int | None = None) -> "_Activations":
        rows = [sum(lengths) for lengths in self.chunks]
        return _Activations(self.folder / name, rows, columns or self.config.hidden_size, self.dtype)


@dataclass(frozen=True)
class _Activations:
    """Rows stored one after the other in a file, which are read in chunks."""

    path: Path
    chunks: list[int]  # number of rows of each chunk
    columns: int
    dtype: torch.dtype

    def __iter__(self) -> Iterator[Tensor]:
        with self.path.open("rb") as file:
            for rows in self.chunks:
                chunk = torch.empty(rows, self.columns, dtype=self.dtype)
                if rows:
                    file.readinto(chunk.view(torch.uint8).numpy().data)
                yield chunk


def _product(
    matrices: tuple[Matrix, ...], tensors: dict[str, Tensor], dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Return the product of matrices that share an input, with the layer's present tensors."""
    weights = [weight_of(matrix, tensors[matrix.weight_name]).to(dtype) for matrix in matrices]
    biases = [bias_of(m, tensors[m.bias_name]).to(dtype) for m in matrices if m.bias]
    return partial(linear, weight_NK=torch.cat(weights), bias_N=torch.cat(biases) if biases else None)


def _rows_of(expert: int, chosen_Tk: Tensor) -> Tensor:
    """Return the tokens that chose this expert, int64, in order."""
    return (chosen_Tk == expert).any(1).nonzero()[:, 0]


def _weighted_sum(chosen: tuple[Tensor, Tensor], outputs: tuple[Tensor, ...], shared_TD: Tensor | None) -> Tensor:
    """Return the weighted sum [T, D] of experts' outputs, each for the tokens that chose it, and of what is shared."""
    ids_Tk, weights_Tk = chosen
    total = torch.zeros(len(ids_Tk), outputs[0].shape[1])
    for i, out in enumerate(outputs):
        rows = _rows_of(i, ids_Tk)
        weights = (weights_Tk[rows] * (ids_Tk[rows] == i)).sum(1, keepdim=True)
        total.index_add_(0, rows, out.float() * weights)
    if shared_TD is not None:
        total += shared_TD
    return total.to(outputs[0].dtype)


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
    # torch cannot view an empty tensor as bytes.
    return x.contiguous().view(torch.uint8).numpy().tobytes() if len(x) else b""


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


def _in_chunks(lengths: list[int]) -> list[list[int]]:
    """Split the sequences' lengths into chunks of about `CHUNK_TOKENS` tokens, in order."""
    chunks: list[list[int]] = [[]]
    for length in lengths:
        if sum(chunks[-1]) + length > CHUNK_TOKENS and chunks[-1]:
            chunks.append([])
        chunks[-1].append(length)
    return chunks
