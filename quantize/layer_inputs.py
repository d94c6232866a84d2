"""`Calibration`: runs text through a model layer by layer, so that each matrix can be quantized for its own inputs.

The hidden states between two layers are kept in a file. So memory holds a few thousand tokens of one layer, however
much text there is, and an interrupted run can resume from the file. A matrix's inputs come from the quantized matrices
before it, so that it can correct their error.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.activation import activate
from batchinfer.kernels.kv_cache import CPU, rotate
from batchinfer.kernels.linear import linear
from batchinfer.kernels.norm import rms_norm
from batchinfer.kernels.processor import multiplied_in
from batchinfer.kernels.state_pool import StateBatch, StatePool
from batchinfer.models.config import ModelConfig
from batchinfer.models.layer import Attention, Mixer, Norm
from batchinfer.models.recurrent import recurrent_weights
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
        self.angles = {rope: rope.tables(longest) for rope in {a.rope for a in self.config.attentions}}
        growth = config.attention.query_growth
        self.growth = None if growth is None else growth.factors(longest)[:, None, None]

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences."""
        return len(self.token_ids)

    def begin(self, embedding_VD: Tensor) -> None:
        """Compute and store the hidden states before the first layer."""
        chunks = torch.split(torch.from_numpy(self.token_ids), [sum(lengths) for lengths in self.chunks])
        self._store(_states(0), (self._embedded(chunk, embedding_VD) for chunk in chunks))

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
        entered = [name for name in layer.mixer.products if name != "output"]
        for name in entered:
            yield name, normed(entering, layer.input_norm)
        made = zip(*(map(product(name), normed(entering, layer.input_norm)) for name in entered), strict=True)
        chunks = ((dict(zip(entered, parts, strict=True)), n) for parts, n in zip(made, self.chunks, strict=True))
        mixed = self._store("mixed", (self._mix(parts, n, layer.mixer, tensors) for parts, n in chunks))
        yield "output", iter(mixed)
        middle = self._store("middle", added(entering, mixed, "output", layer.attention_norm))
        yield "gate_up", normed(middle, layer.mlp_norm)
        f = layer.feed_forward
        act = partial(activate, activation=f.activation, gated=f.gate is not None)
        inner = self._store("inner", map(act, map(product("gate_up"), normed(middle, layer.mlp_norm))))
        yield "down", iter(inner)
        self._store(_states(number + 1), added(middle, inner, "down", layer.mlp_output_norm))

    def leave(self, layer: int) -> None:
        """Delete the states before this layer, which are not needed any more."""
        (self.folder / _states(layer)).unlink(missing_ok=True)

    def _mix(self, made: dict[str, Tensor], lengths: list[int], shape: Mixer, tensors: dict[str, Tensor]) -> Tensor:
        """Return the input [T, K] of the product `output`, of the products before it, by name."""
        if isinstance(shape, Attention):
            return self._attend(made["qkv"], lengths, shape, tensors)
        weights = recurrent_weights(shape, lambda name, _: tensors[name], self.config.norm_eps)
        pool = StatePool(len(lengths) + 1, weights.state, self.dtype, CPU)
        return weights.mix(made, pool, StateBatch.of_prompts(lengths)).to(self.dtype)

    def _attend(self, qkv_TX: Tensor, lengths: list[int], shape: Attention, tensors: dict[str, Tensor]) -> Tensor:
        """Return attention's outputs [T, heads * head_dim], computed one sequence at a time."""
        cos, sin = self.angles[shape.rope]
        out = []
        for qkv in torch.split(qkv_TX[:, : shape.width], lengths):
            query, key, value = torch.split(qkv, [shape.q.rows, shape.k.rows, shape.v.rows], 1)
            if shape.normed_together:
                query, key = self._head_norms(query, key, shape, tensors)
            query, key, value = (x.reshape(len(qkv), -1, shape.head_dim) for x in (query, key, value))
            if not shape.normed_together:
                query, key = self._head_norms(query, key, shape, tensors)
            query, key = (rotate(x, cos[: len(qkv)], sin[: len(qkv)]) for x in (query, key))
            if self.growth is not None:
                query = (query * self.growth[: len(qkv)]).to(self.dtype)
            query, key, value = (x.transpose(0, 1).to(multiplied_in(self.dtype)) for x in (query, key, value))
            mixed = _attention(query, key, value, shape)
            out.append(mixed.transpose(0, 1).flatten(1).to(self.dtype))
        mixed = torch.cat(out)
        return mixed if shape.gate is None else mixed.mul_(qkv_TX[:, shape.width :].sigmoid())

    def _head_norms(
        self, query: Tensor, key: Tensor, shape: Attention, tensors: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if shape.head_norms is None:
            return query, key
        of_query, of_key = (norm_weight(n, tensors[f"{n.name}.weight"], self.dtype) for n in shape.head_norms)
        return rms_norm(query, of_query, self.config.norm_eps), rms_norm(key, of_key, self.config.norm_eps)

    def _store(self, name: str, chunks_TX: Iterable[Tensor]) -> "_Activations":
        unfinished = self.folder / f"{name}.unfinished"
        with unfinished.open("wb") as file:
            for chunk in chunks_TX:
                file.write(chunk.contiguous().view(torch.uint8).numpy().tobytes())
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
    return f"states-{layer:05}"


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
