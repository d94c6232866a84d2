"""`Calibration`: rows carried through a model layer by layer, so that each matrix can be quantized for its own inputs.

What lies between two layers lies in a file: memory holds a few thousand tokens of one layer, however many rows there
are, and a run that was interrupted goes on from the file. Each matrix sees inputs that went through the quantized ones
before it, so that it can make up for their error.
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

from batchinfer.kernels.activation import silu_mul
from batchinfer.kernels.kv_cache import rotate
from batchinfer.kernels.norm import rms_norm
from batchinfer.models.config import ModelConfig

PIECE_TOKENS = 2048
"""Tokens of whole sequences that are computed at once, about."""

PRODUCTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The matrices of a layer that read the same input, in the order in which they are used."""


class Calibration:
    """Sequences of token ids and where they stand. Everything is computed in `dtype`."""

    def __init__(
        self, config: ModelConfig, sequences: list[NDArray[np.int32]], dtype: torch.dtype, folder: Path
    ) -> None:
        self.config, self.dtype, self.folder = config, dtype, folder
        self.token_ids = np.concatenate(sequences).astype(np.int64)
        self.pieces = _in_pieces([len(sequence) for sequence in sequences])
        self.cos, self.sin = config.rope.tables(max(map(len, sequences)))

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return len(self.token_ids)

    def begin(self, embedding_VD: Tensor) -> None:
        """The hidden states before the first layer."""
        pieces = torch.split(torch.from_numpy(self.token_ids), [sum(lengths) for lengths in self.pieces])
        self._store(_states(0), (F.embedding(piece, embedding_VD).to(self.dtype) for piece in pieces))

    def columns(self, product: str) -> int:
        """Of the inputs of a product."""
        c = self.config
        return {"output": c.heads * c.head_dim, "down": c.intermediate_size}.get(product, c.hidden_size)

    def stages(self, layer: int, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Iterator[Tensor]]]:
        """The products of a layer in turn, each with its inputs in pieces [T, K].

        `tensors` are the layer's by name (without its prefix). Whoever takes a product may put other weights in their
        place before going on: what comes after is computed with those. At the end the next layer's states are there.
        """

        def product(name: str) -> Callable[[Tensor], Tensor]:
            weight = torch.cat([tensors[f"{part}.weight"].to(self.dtype) for part in PRODUCTS[name]])
            biases = [tensors[f"{part}.bias"].to(self.dtype) for part in PRODUCTS[name] if f"{part}.bias" in tensors]
            return partial(F.linear, weight=weight, bias=torch.cat(biases) if biases else None)

        def normed(states: Iterable[Tensor], norm: str) -> Iterator[Tensor]:
            weight = tensors[f"{norm}.weight"].to(self.dtype)
            return (rms_norm(x, weight, self.config.norm_eps) for x in states)

        def added(states: Iterable[Tensor], inputs: Iterable[Tensor], name: str) -> Iterator[Tensor]:
            return (x + y for x, y in zip(states, map(product(name), inputs), strict=True))

        entering = self._stored(_states(layer))
        yield "qkv", normed(entering, "input_layernorm")
        heads = map(product("qkv"), normed(entering, "input_layernorm"))
        attended = (self._attend(x, piece, layer, tensors) for x, piece in zip(heads, self.pieces, strict=True))
        mixed = self._store("mixed", attended)
        yield "output", iter(mixed)
        middle = self._store("middle", added(entering, mixed, "output"))
        yield "gate_up", normed(middle, "post_attention_layernorm")
        inner = self._store("inner", map(silu_mul, map(product("gate_up"), normed(middle, "post_attention_layernorm"))))
        yield "down", iter(inner)
        self._store(_states(layer + 1), added(middle, inner, "down"))

    def leave(self, layer: int) -> None:
        """The states before this layer are not needed any more."""
        (self.folder / _states(layer)).unlink(missing_ok=True)

    def _attend(self, qkv_TX: Tensor, lengths: list[int], layer: int, tensors: dict[str, Tensor]) -> Tensor:
        """Attention outputs [T, heads * head_dim], each sequence by itself."""
        c = self.config
        out = []
        for qkv in torch.split(qkv_TX, lengths):
            heads = qkv.view(len(qkv), -1, c.head_dim)
            query, key, value = torch.split(heads, [c.heads, c.kv_heads, c.kv_heads], 1)
            if c.head_norm:
                query = rms_norm(query, tensors["self_attn.q_norm.weight"].to(self.dtype), c.norm_eps)
                key = rms_norm(key, tensors["self_attn.k_norm.weight"].to(self.dtype), c.norm_eps)
            cos, sin = self.cos[: len(qkv)], self.sin[: len(qkv)]
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
            seen = _seen(len(qkv), c.windows[layer])
            mixed = F.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)
            out.append(mixed[0].transpose(0, 1).flatten(1))
        return torch.cat(out)

    def _store(self, name: str, pieces_TX: Iterable[Tensor]) -> "_Activations":
        unfinished = self.folder / f"{name}.unfinished"
        with unfinished.open("wb") as file:
            for piece in pieces_TX:
                file.write(piece.contiguous().view(torch.uint8).numpy().tobytes())
        unfinished.replace(self.folder / name)
        return self._stored(name)

    def _stored(self, name: str) -> "_Activations":
        return _Activations(self.folder / name, [sum(lengths) for lengths in self.pieces], self.dtype)


@dataclass(frozen=True)
class _Activations:
    """Rows in a file, one after the other, in pieces of so many."""

    path: Path
    pieces: list[int]
    dtype: torch.dtype

    def __iter__(self) -> Iterator[Tensor]:
        a_row = self.path.stat().st_size // sum(self.pieces)
        with self.path.open("rb") as file:
            for rows in self.pieces:
                values = torch.from_numpy(np.fromfile(file, np.uint8, rows * a_row))
                yield values.view(self.dtype).view(rows, -1)


def _states(layer: int) -> str:
    return f"states-{layer:05}"


def _seen(length: int, window: int | None) -> Tensor:
    """Which positions [length, length] a position sees: those up to itself, `window` of them at most."""
    positions = torch.arange(length)
    distance = positions[:, None] - positions
    return (distance >= 0) & (distance < (window or length))


def _in_pieces(lengths: list[int]) -> list[list[int]]:
    """The sequences' lengths in groups of about `PIECE_TOKENS`, in order."""
    pieces: list[list[int]] = [[]]
    for length in lengths:
        if sum(pieces[-1]) + length > PIECE_TOKENS and pieces[-1]:
            pieces.append([])
        pieces[-1].append(length)
    return pieces
