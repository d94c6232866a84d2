"""Paged attention over a ragged batch: prompt tokens in tiles, generated tokens one query at a time.

A row's bits must not depend on the batch, so the shape of every product here follows from the token's own position.
Prompt tiles lie on a fixed grid of `TILE` positions that begins at the sequence's start. Generated tokens go through
the cache block by block, and the blocks' sums are added in order.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.grain import TILE
from batchinfer.kernels.kv_cache import KVCache
from batchinfer.kernels.processor import multiplied_in

LEAST_ROWS = 4
"""The fewest rows of a batched product. With fewer, MKL takes other kernels, which add in another order."""


@dataclass(frozen=True)
class PromptTiles:
    """n tiles of queries at the same positions of n sequences: index * TILE up to (index + 1) * TILE."""

    index: int
    rows: Tensor  # [n, TILE] int64, the queries' rows among the step's tokens; arbitrary past a prompt's end
    blocks: Tensor  # [n, (index + 1) * TILE / block_size] int64, the sequences' blocks up to the tile's end
    kept: Tensor  # [k] int64, indices of the real queries in rows.flatten()


@dataclass(frozen=True)
class BlockUsers:
    """b blocks of the pool, each read by u queries. A block takes one matrix product, whatever u is."""

    blocks: slice | Tensor  # a range of the pool, or int64 [b]
    queries: Tensor  # [b, u] int64; 0 for a block that no sequence holds: its results are never read


@dataclass(frozen=True)
class DecodeBlocks:
    """n single queries and the blocks that they read. There are e entries, each a pair of a query and a block.

    Sequences that share blocks, and several queries of one sequence, need no special treatment: all are entries.
    """

    rows: slice  # the queries' rows among the step's tokens
    users: tuple[BlockUsers, ...]  # all entries, grouped by block
    owner: Tensor  # [e] int64, the query of each entry
    edges: Tensor  # [m] int64, entries whose query may see only some of the block's positions
    hidden: Tensor  # [m, 1, block_size] bool, the positions of these blocks that the query must not see
    table: Tensor  # [n, most] int64, the entries of each query, padded by repeating its first
    order: Tensor  # [total] int64, the same entries in one list, those of a query in the order of its positions
    offsets: Tensor  # [n + 1] int64, where each query's entries begin in `order`


@dataclass(frozen=True)
class TiledBatch:
    """A step's queries and the blocks they read, for the layers that have this attention window."""

    window: int | None  # a token sees this many positions, its own included; None: all up to its own
    tiles: tuple[PromptTiles, ...]
    decode: DecodeBlocks | None  # without blocks outside the window; None if the step generates no token


def attention(
    query_THd: Tensor,
    cache: KVCache,
    batch: TiledBatch,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Return attention's outputs [T, heads, head_dim] in the query's dtype; padding rows are zero.

    The step's own keys and values must be in the cache already. With a `softcap` c, scores s become c * tanh(s / c).
    `sinks` are float32 scores that count in softmax and stand for no value.
    """
    out = torch.zeros_like(query_THd)
    for group in batch.tiles:
        _prompt_tiles(out, query_THd, cache, group, scale, softcap, sinks_H, batch.window)
    if (decode := batch.decode) is not None:
        query = query_THd[decode.rows].float()
        out[decode.rows] = decode_blocks(query, cache, decode, scale, softcap, sinks_H).to(out.dtype)
    return out


def _prompt_tiles(
    out_THd: Tensor,
    query_THd: Tensor,
    cache: KVCache,
    group: PromptTiles,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
    window: int | None,
) -> None:
    n, heads, head_dim = len(group.rows), query_THd.shape[1], query_THd.shape[2]
    kv_heads = cache.key.shape[1]
    first = 0 if window is None else max(0, (group.index * TILE - window + 1) // TILE)
    blocks = group.blocks[:, first * TILE // cache.block_size :]
    dtype = multiplied_in(query_THd.dtype)
    key, value = (read_blocks(cache, blocks, kind, dtype) for kind in ("key", "value"))
    # The query heads that share a key head are stacked into one tile of group * TILE rows.
    query = query_THd[group.rows.flatten()].to(dtype).view(n, TILE, kv_heads, heads // kv_heads, head_dim)
    query = query.permute(0, 2, 3, 1, 4).reshape(n, kv_heads, -1, head_dim)
    mask = _tile_mask(group.index, first, heads // kv_heads, window, dtype)
    if softcap is None and sinks_H is None:
        result = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    else:
        query, key, value = (x.flatten(0, 1) for x in (query * scale, key, value))
        scores = batched_product(query, key.transpose(1, 2))
        scores = (scores if softcap is None else _capped(scores, softcap)) + mask[0]
        if sinks_H is None:
            shares = scores.float().softmax(-1)
        else:  # one score for each row of the stacked tiles
            sinks = sinks_H.view(kv_heads, -1, 1).repeat_interleave(TILE, 1).repeat(n, 1, 1)
            shares = torch.cat([scores.float(), sinks], -1).softmax(-1)[..., :-1]
        result = batched_product(shares.to(dtype), value)
    result = result.view(n, kv_heads, heads // kv_heads, TILE, head_dim).permute(0, 3, 1, 2, 4)
    result = result.reshape(n * TILE, heads, head_dim)
    out_THd[group.rows.flatten()[group.kept]] = result[group.kept].to(out_THd.dtype)


def _capped(scores: Tensor, softcap: float) -> Tensor:
    """Cap the scores in place, softly (Gemma 2, Gemma Team 2024)."""
    return scores.div_(softcap).tanh_().mul_(softcap)


@lru_cache(maxsize=256)
def _tile_mask(index: int, first: int, group: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return the mask [1, 1, group * TILE, keys] for a tile's queries by the keys of the tiles `first` to `index`.

    It is 0 where the query sees the key, and -inf elsewhere.
    """
    q = torch.arange(index * TILE, (index + 1) * TILE)[:, None]
    k = torch.arange(first * TILE, (index + 1) * TILE)
    seen = k <= q if window is None else (k <= q) & (k > q - window)
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
    return mask.repeat(group, 1)[None, None]


def read_blocks(cache: KVCache, blocks_nb: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Return whole blocks of the cache in `dtype`, [n, kv_heads, b * block_size, head_dim].

    `kind` is "key" or "value".
    """
    pool: Tensor = getattr(cache, kind)
    scales: Tensor | None = getattr(cache, f"{kind}_scale")
    n, b = blocks_nb.shape
    flat = blocks_nb.flatten()
    values = pool[flat].to(dtype)
    if scales is not None:
        values.mul_(scales[flat][..., None])
    kv_heads, size, head_dim = pool.shape[1:]
    return values.view(n, b, kv_heads, size, head_dim).transpose(1, 2).reshape(n, kv_heads, b * size, head_dim)


def decode_blocks(
    query_nHd: Tensor,
    cache: KVCache,
    batch: DecodeBlocks,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Return attention's outputs, float32 [n, heads, head_dim], for single queries.

    Blocks are not gathered by query: each is read once, where it lies, and multiplied by all queries that read it.
    Softmax uses the maximum over all of a query's blocks. The blocks' partial sums are added in the order of their
    positions.
    """
    n, heads, head_dim = query_nHd.shape
    query = (query_nHd * scale)[batch.owner]
    scores = _by_users(cache, batch, "key", query)
    if softcap is not None:
        scores = _capped(scores, softcap)
    scores[batch.edges] = scores[batch.edges].masked_fill_(batch.hidden, float("-inf"))
    most = scores.amax(-1)[batch.table].amax(1)
    if sinks_H is not None:
        most = torch.maximum(most, sinks_H)
    weights = scores.sub_(most[batch.owner][..., None]).exp_()
    norm = _sum_in_order(weights.sum(-1), batch)
    if sinks_H is not None:
        norm += (sinks_H - most).exp_()
    partial = _by_users(cache, batch, "value", weights).flatten(1)
    return _sum_in_order(partial, batch).view(n, heads, head_dim).div_(norm[..., None])


def _by_users(cache: KVCache, batch: DecodeBlocks, kind: str, rows_eHX: Tensor) -> Tensor:
    """Multiply each entry's rows by the keys or the values of its block: [e, heads, block_size or head_dim]."""
    ends = np.cumsum([users.queries.numel() for users in batch.users])
    products = [
        _by_blocks(cache, users, kind, rows_eHX[end - users.queries.numel() : end])
        for users, end in zip(batch.users, ends.tolist(), strict=True)
    ]
    return products[0] if len(products) == 1 else torch.cat(products)


def _by_blocks(cache: KVCache, users: BlockUsers, kind: str, rows_eHX: Tensor) -> Tensor:
    pool: Tensor = getattr(cache, kind)
    scales: Tensor | None = getattr(cache, f"{kind}_scale")
    (b, u), (heads, width) = users.queries.shape, rows_eHX.shape[1:]
    kv_heads, size, head_dim = pool.shape[1:]
    matrix = pool[users.blocks].float().view(b * kv_heads, size, head_dim)
    # All queries of a block, with all query heads that share its key head, are stacked into one matrix.
    rows = rows_eHX.view(b, u, kv_heads, heads // kv_heads, width).transpose(1, 2)
    scale = None if scales is None else scales[users.blocks][:, :, None, None]
    if kind == "value" and scale is not None:
        rows = rows * scale
    rows = rows.reshape(b * kv_heads, u * heads // kv_heads, width)
    product = batched_product(rows, matrix.transpose(1, 2) if kind == "key" else matrix)
    product = product.view(b, kv_heads, u, heads // kv_heads, -1)
    if kind == "key" and scale is not None:
        product = product * scale
    return product.transpose(1, 2).reshape(b * u, heads, -1)


def batched_product(rows_bMK: Tensor, matrix_bKN: Tensor) -> Tensor:
    """Return the b products [b, M, N]; their bits depend neither on M nor on b.

    MKL takes other kernels for a single product and for fewer rows than `LEAST_ROWS`, so both are padded.
    """
    b, m, _ = rows_bMK.shape
    if m < LEAST_ROWS:
        rows_bMK = F.pad(rows_bMK, (0, 0, 0, LEAST_ROWS - m))
    if b == 1:
        rows_bMK, matrix_bKN = rows_bMK.expand(2, -1, -1), matrix_bKN.expand(2, -1, -1)
    return torch.bmm(rows_bMK, matrix_bKN)[:b, :m].contiguous()


def _sum_in_order(partial_eX: Tensor, batch: DecodeBlocks) -> Tensor:
    """Return each query's sum over its blocks, [n, X], added in order.

    An embedding bag does this: it adds rows in the order of its indices.
    """
    return F.embedding_bag(batch.order, partial_eX, batch.offsets, mode="sum", include_last_offset=True)
