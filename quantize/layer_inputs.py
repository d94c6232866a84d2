"""`Calibration`: runs text through a model layer by layer, so that each matrix can be quantized for its own inputs.

The hidden states between two layers are kept in a file. So memory holds a few thousand tokens of one layer, however
much text there is, and an interrupted run can resume from the file. A matrix's inputs come from the quantized matrices
before it, so that it can correct their error.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
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
from batchinfer.kernels.linear import linear
from batchinfer.kernels.norm import norm
from batchinfer.models.config import ModelConfig
from batchinfer.models.feed_forward import Experts, FeedForward
from batchinfer.models.mixer import Attention
from batchinfer.models.per_layer import PerLayerEmbeddings
from batchinfer.models.stored_layer import bias_of, weight_of
from batchinfer.models.tensors import Matrix, Norm
from batchinfer.quantize.activations import Activations
from batchinfer.quantize.mixing import Mixing, norm_of

ROUTER = "router"
"""The stage of what chooses experts. It is not among a layer's `products`: it is never quantized."""
CHUNK_TOKENS = 2048
"""Approximate number of tokens that are computed together; a chunk consists of whole sequences."""


class Stage(NamedTuple):
    """A matrix product that calibration comes to."""

    product: str  # its name in the layer's `products`, or `ROUTER`
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
        self.mixing = Mixing(self.config, self.chunks, dtype, folder)

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
        weights = norm_of(shape.norm, tensors, self.dtype)
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
            weights = norm_of(found, tensors, self.dtype)
            return (norm(x, weights, self.config.norm_eps) for x in states)

        def added(states: Iterable[Tensor], outputs: Iterable[Tensor], found: Norm | None) -> Iterator[Tensor]:
            return (x + y for x, y in zip(states, normed(outputs, found), strict=True))

        entering = self._stored(_states(number))
        entered = [name for name in layer.mixer.products if name != "output"]
        for name in entered:
            yield Stage(name, self.tokens, normed(entering, layer.input_norm))
        made = zip(*(map(product(name), normed(entering, layer.input_norm)) for name in entered), strict=True)
        by_name = (dict(zip(entered, parts, strict=True)) for parts in made)
        mixed = self._store("mixed", self.mixing.mixed(number, by_name, tensors))
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
        """Yield the router's product, whose inputs are all experts', and those of each expert with the tokens that
        chose it; return the mixture's outputs in chunks."""

        def product(name: str) -> Callable[[Tensor], Tensor]:
            return _product(f.products[name], tensors, self.dtype)

        def unquantized(matrix: Matrix) -> Callable[[Tensor], Tensor]:
            return _product((matrix,), tensors, torch.float32)

        yield Stage(ROUTER, self.tokens, inputs())
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
        if f.shared is None:
            return map(_weighted_sum, chosen, zip(*outputs, strict=True), repeat(None, len(chosen)))
        walk = yield from self._block(f.shared, "shared expert ", product, inputs)
        shared: Iterable[Tensor] = self._store("shared expert", walk)
        if f.shared_gate is not None:
            gates = map(unquantized(f.shared_gate), (x.float() for x in inputs()))
            shared = (x * gate.sigmoid().to(x.dtype) for x, gate in zip(shared, gates, strict=True))
        return map(_weighted_sum, chosen, zip(*outputs, strict=True), shared)

    def leave(self, layer: int) -> None:
        """Delete what the layers from this one on do not need any more."""
        names = [_states(layer), _per_layer(layer)]
        mixer = self.config.layers[layer].mixer if layer >= 0 else None
        if isinstance(mixer, Attention) and mixer.source is not None:
            names += (
                [] if mixer.source in self.mixing.sources(layer + 1) else [self.mixing.keys_file(mixer.source).name]
            )
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def _store(self, name: str, chunks_TX: Iterable[Tensor]) -> Activations:
        return Activations.write(self.folder / name, chunks_TX, self.dtype)

    def _stored(self, name: str, columns: int | None = None) -> Activations:
        rows = [sum(lengths) for lengths in self.chunks]
        return Activations(self.folder / name, rows, columns or self.config.hidden_size, self.dtype)


def _product(
    matrices: tuple[Matrix, ...], tensors: dict[str, Tensor], dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Return the product of matrices that share an input, with the layer's present tensors."""
    weights = [weight_of(matrix, tensors[f"{matrix.name}.weight"]).to(dtype) for matrix in matrices]
    biases = [bias_of(m, tensors[f"{m.name}.bias"]).to(dtype) for m in matrices if m.bias]
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


def _in_chunks(lengths: list[int]) -> list[list[int]]:
    """Split the sequences' lengths into chunks of about `CHUNK_TOKENS` tokens, in order."""
    chunks: list[list[int]] = [[]]
    for length in lengths:
        if sum(chunks[-1]) + length > CHUNK_TOKENS and chunks[-1]:
            chunks.append([])
        chunks[-1].append(length)
    return chunks
