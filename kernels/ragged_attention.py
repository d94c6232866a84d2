"""Paged attention over sequences with any number of new tokens each: what a step asks for, and the plain reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.kernels.kv_cache import KVCache
from batchinfer.kernels.ragged import Ints


@dataclass(frozen=True)
class SharedPrefix:
    """Sequences [first, first + count) of a batch whose blocks are the same up to `keys` positions.

    `keys` is a multiple of the block size, and no new token of theirs stands before it.
    """

    first: int
    count: int
    keys: int


@dataclass(frozen=True)
class RaggedBatch:
    """S sequences and their new tokens, which lie one after the other in the step's tokens.

    A piece of a prompt, a token that is decoded and drafts that are verified differ in nothing but their number. The
    new tokens' own keys and values are already in the cache.
    """

    offsets: Ints  # [S + 1], sequence s has the tokens [offsets[s], offsets[s + 1]), at least one
    contexts: Ints  # [S], positions of the sequence up to its last new token, itself included
    table: Tensor  # [S, most] int32, contiguous, where the pool is: the sequences' blocks
    prefixes: tuple[SharedPrefix, ...] = ()  # of sequences that no other prefix has


def ragged_attention(query_THd: Tensor, cache: KVCache, batch: RaggedBatch, scale: float, window: int | None) -> Tensor:
    """[T, heads, head_dim] of the query's type and computed in it, or in float32 for 16 bits: one sequence at a time.

    A token sees the `window` positions up to its own (None: all of them). Tokens of no sequence get zeros.
    """
    out = torch.zeros_like(query_THd)
    dtype = torch.promote_types(query_THd.dtype, torch.float32)
    for s, context in enumerate(batch.contexts.tolist()):
        start, end = batch.offsets[s : s + 2].tolist()
        query = query_THd[start:end].to(dtype)
        key, value = (_positions(cache, batch.table[s], part, context, dtype) for part in ("key", "value"))
        group = query.shape[1] // key.shape[1]
        scores = torch.einsum("thd,nhd->htn", query, key.repeat_interleave(group, 1)) * scale
        own = torch.arange(context - (end - start), context, device=query.device)[:, None]
        position = torch.arange(context, device=query.device)
        seen = (position <= own) & (position > own - (window or context))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[start:end] = torch.einsum("htn,nhd->thd", weights, value.repeat_interleave(group, 1)).to(out.dtype)
    return out


def _positions(cache: KVCache, blocks_b: Tensor, part: str, count: int, dtype: torch.dtype) -> Tensor:
    """[count, kv_heads, head_dim] keys or values (`part`) of a sequence's first positions, from its blocks."""
    used = blocks_b[: -(-count // cache.block_size)].long()
    values: Tensor = getattr(cache, part)[used].to(dtype)  # [b, kv_heads, block_size, head_dim]
    scales: Tensor | None = getattr(cache, f"{part}_scale")
    if scales is not None:
        values = values * scales[used][..., None].to(dtype)
    return values.transpose(1, 2).flatten(0, 1)[:count]
