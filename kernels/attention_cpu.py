"""Attention over a ragged batch by the kernel in C (`attention_cpu.c`)."""

import ctypes
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from batchinfer.kernels.cpu_library import Arguments, address, floats, integers, pointers, type_number
from batchinfer.kernels.kv_cache import KVCache
from batchinfer.kernels.ragged import Ints
from batchinfer.kernels.ragged_attention import RaggedBatch

MOST_HEAD_DIM = 512
_ROWS, _NUMBERS = 64, 64 * 128  # of an item, as in the kernel


def tokens_of_item(group: int, head_dim: int) -> int:
    """Return how many tokens read keys together, where `group` query heads share a key head."""
    return max(1, min(_ROWS, _NUMBERS // (-(-head_dim // 16) * 16)) // group)


@dataclass(frozen=True)
class WindowedBatch:
    """A step's sequences, for the layers with this attention window."""

    sequences: RaggedBatch
    window: int | None  # a token sees this many positions, its own included; None: all up to its own

    @cached_property
    def prefixes(self) -> Ints:
        """The shared prefixes, int64 [p, 3]: first sequence, number of sequences, and keys of each."""
        columns = ((p.first, p.count, p.keys) for p in self.sequences.prefixes)
        return np.array(list(columns), np.int64).reshape(-1, 3)

    @cached_property
    def fields(self) -> tuple[int | None, ...]:
        """The kernel's fields from `sequences` to `window`: the same for all layers."""
        ragged = self.sequences
        return (
            *(len(ragged.contexts), ragged.offsets.ctypes.data, ragged.contexts.ctypes.data, address(ragged.table)),
            *(ragged.table.shape[1], len(self.prefixes), self.prefixes.ctypes.data, self.window or 0),
        )


class _Attention(Arguments):
    _fields_ = (
        *pointers("query out"),
        *integers("type heads kv_heads head_dim"),
        *pointers("key value key_scale value_scale"),
        *integers("kv_type block_size sequences"),
        *pointers("offsets contexts table"),
        *integers("most prefixes"),
        *pointers("prefix"),
        *integers("window"),
        *floats("scale softcap"),
        *pointers("sinks states"),
    )


def attention(
    library: ctypes.CDLL,
    query_THd: Tensor,
    cache: KVCache,
    batch: WindowedBatch,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Return attention's outputs [T, heads, head_dim] in the query's type, float32 or bfloat16; padding gets zeros.

    The cache must have its keys by column. A token's bits depend on its own query and on what it sees alone. Raises
    `ValueError` for heads larger than `MOST_HEAD_DIM`, and `MemoryError` where the list of work does not fit in memory.
    """
    query, filled = query_THd.contiguous(), int(batch.sequences.offsets[-1])
    tokens, heads, head_dim = query.shape
    assert filled <= tokens and cache.key.stride(-2) == 1
    assert sinks_H is None or (sinks_H.dtype == torch.float32 and sinks_H.is_contiguous())
    if head_dim > MOST_HEAD_DIM:
        raise ValueError(
            f"heads have {head_dim} numbers; the kernel takes at most {MOST_HEAD_DIM}: take --cpu-path reference"
        )
    out = torch.empty_like(query)
    if filled < tokens:
        out[filled:] = 0
    states = torch.empty(tokens * heads * (head_dim + 2)) if len(batch.prefixes) else None
    arguments = _Attention(
        *(address(query), address(out)),
        *(type_number(query.dtype), heads, cache.kv_heads, head_dim),
        *map(address, (cache.key, cache.value, cache.key_scale, cache.value_scale)),
        *(type_number(cache.key.dtype), cache.block_size, *batch.fields),
        *(scale, softcap or 0.0, address(sinks_H), address(states)),
    )
    if library.attention(ctypes.byref(arguments)):
        raise MemoryError(f"there is no memory for the list of attention's work over {tokens} tokens")
    return out
