"""`RaggedBatch`: a step's sequences with any number of new tokens each; and attention over it, the plain reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.kernels.kv_cache import KVCache
from batchinfer.kernels.ragged import Ints


@dataclass(frozen=True)
class SharedPrefix:
    """Sequences [first, first + count) of a batch share the blocks of their first `keys` positions.

    `keys` is a multiple of the block size, and all new tokens of these sequences come after them.
    """

    first: int
    count: int
    keys: int


@dataclass(frozen=True)
class RaggedBatch:
    """S sequences and their new tokens, which follow each other in the step's tokens.

    The new tokens may be a chunk of a prompt, a decoded token, or a decoded token and its drafts: only their number
    differs. The new tokens' own keys and values are already in the cache.
    """

    offsets: Ints  # [S + 1], sequence s has the tokens [offsets[s], offsets[s + 1]), at least one
    contexts: Ints  # [S], positions of the sequence up to its last new token, that one included
    table: Tensor  # [S, most] int32, contiguous, on the cache's device: the sequences' blocks
    prefixes: tuple[SharedPrefix, ...] = ()  # a sequence has at most one


def ragged_attention(
    query_THd: Tensor,
    cache: KVCache,
    batch: RaggedBatch,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Return attention's outputs [T, heads, head_dim] in the query's type, computed one sequence at a time.

    16-bit queries are computed in float32. A token sees the `window` positions up to its own (None: all of them).
    Padding tokens get zeros. With a `softcap` c, scores s become c * tanh(s / c). `sinks` are scores that count
    in softmax and stand for no value.
    """
    out = torch.zeros_like(query_THd)
    dtype = torch.promote_types(query_THd.dtype, torch.float32)
    for s, context in enumerate(batch.contexts.tolist()):
        start, end = batch.offsets[s : s + 2].tolist()
        query = query_THd[start:end].to(dtype)
        key, value = (_positions(cache, batch.table[s], kind, context, dtype) for kind in ("key", "value"))
        group = query.shape[1] // key.shape[1]
        scores = torch.einsum("thd,nhd->htn", query, key.repeat_interleave(group, 1)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        own = torch.arange(context - (end - start), context, device=query.device)[:, None]
        position = torch.arange(context, device=query.device)
        seen = (position <= own) & (position > own - (window or context))
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks_H is not None:
            scores = torch.cat([scores, sinks_H.to(dtype)[:, None, None].expand(-1, len(query), 1)], -1)
        weights = scores.softmax(-1)[..., :context]
        out[start:end] = torch.einsum("htn,nhd->thd", weights, value.repeat_interleave(group, 1)).to(out.dtype)
    return out


def _positions(cache: KVCache, blocks_b: Tensor, kind: str, count: int, dtype: torch.dtype) -> Tensor:
    """Return the keys or values of a sequence's first positions from its blocks, [count, kv_heads, head_dim].

    `kind` is "key" or "value".
    """
    used = blocks_b[: -(-count // cache.block_size)].long()
    values: Tensor = getattr(cache, kind)[used].to(dtype)  # [b, kv_heads, block_size, head_dim]
    scales: Tensor | None = getattr(cache, f"{kind}_scale")
    if scales is not None:
        values = values * scales[used][..., None].to(dtype)
    return values.transpose(1, 2).flatten(0, 1)[:count]
