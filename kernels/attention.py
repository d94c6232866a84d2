"""Paged attention over a ragged batch: prompt tokens in tiles, generated tokens one query at a time.

A row's bits must not depend on the batch, so every product here has a shape that follows from the token's own
position: prompt tiles lie on a fixed grid of `TILE` positions from the sequence's start, generated tokens walk the
cache block by block and the blocks' sums are added in order.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.grain import TILE
from batchinfer.kernels.kv_cache import KVCache

LEAST_ROWS = 4
"""Below this many rows batched products take other kernels (other sums); from here up a row's bits stay the same."""


@dataclass(frozen=True)
class PromptTiles:
    """n tiles of queries that stand at the same place of their sequences: positions [index * TILE, + TILE)."""

    index: int
    rows: Tensor  # [n, TILE] int64, where the queries are in the step's tokens; past a prompt's end any row
    blocks: Tensor  # [n, (index + 1) * TILE / block_size] int64, the sequences' blocks up to the tile's end
    kept: Tensor  # [k] int64, the places of real queries in rows.flatten()


@dataclass(frozen=True)
class BlockUsers:
    """b blocks of the pool, each of which u queries look at: one product a block, however many they are."""

    blocks: slice | Tensor  # a range of the pool, or int64 [b]
    queries: Tensor  # [b, u] int64; 0 in blocks of nobody, whose results nobody reads


@dataclass(frozen=True)
class DecodeBlocks:
    """n queries, each by the blocks that it walks; e entries, a query and a block each.

    Sequences that share blocks, and several queries of one sequence, differ in nothing from single ones.
    """

    rows: slice  # where the queries are in the step's tokens
    users: tuple[BlockUsers, ...]  # the entries, one after the other
    owner: Tensor  # [e] int64, the query of each entry
    edges: Tensor  # [m] int64, entries whose query sees a part of the block only
    hidden: Tensor  # [m, 1, block_size] bool, the positions of those that it does not see
    table: Tensor  # [n, most] int64, the entries of each query, its first repeated as padding
    order: Tensor  # [total] int64, the same entries, flat, each query's in the order of its sequence
    offsets: Tensor  # [n + 1] int64 into order


@dataclass(frozen=True)
class TiledBatch:
    """What a step's attention reads, in the layers that have this window."""

    window: int | None  # a token sees that many positions, itself included; None: all before it
    tiles: tuple[PromptTiles, ...]
    decode: DecodeBlocks | None  # cut to the window; None if nothing decodes


def attention(query_THd: Tensor, cache: KVCache, batch: TiledBatch, scale: float) -> Tensor:
    """Attention outputs [T, heads, head_dim] in the query's dtype; rows of no query are zero.

    The step's own keys and values are already in the cache.
    """
    out = torch.zeros_like(query_THd)
    for group in batch.tiles:
        _prompt_tiles(out, query_THd, cache, group, scale, batch.window)
    if (decode := batch.decode) is not None:
        out[decode.rows] = decode_blocks(query_THd[decode.rows].float(), cache, decode, scale).to(out.dtype)
    return out


def _prompt_tiles(
    out_THd: Tensor, query_THd: Tensor, cache: KVCache, group: PromptTiles, scale: float, window: int | None
) -> None:
    n, heads, head_dim = len(group.rows), query_THd.shape[1], query_THd.shape[2]
    kv_heads = cache.key.shape[1]
    first = 0 if window is None else max(0, (group.index * TILE - window + 1) // TILE)
    blocks = group.blocks[:, first * TILE // cache.block_size :]
    key, value = (read_blocks(cache, blocks, part, query_THd.dtype) for part in ("key", "value"))
    # A group of query heads shares a head of keys: they stand below each other in one tile of group * TILE queries.
    query = query_THd[group.rows.flatten()].view(n, TILE, kv_heads, heads // kv_heads, head_dim)
    query = query.permute(0, 2, 3, 1, 4).reshape(n, kv_heads, -1, head_dim)
    mask = _tile_mask(group.index, first, heads // kv_heads, window, query.dtype)
    result = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    result = result.view(n, kv_heads, heads // kv_heads, TILE, head_dim).permute(0, 3, 1, 2, 4)
    result = result.reshape(n * TILE, heads, head_dim)
    out_THd[group.rows.flatten()[group.kept]] = result[group.kept]


@lru_cache(maxsize=256)
def _tile_mask(index: int, first: int, group: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[1, 1, group * TILE, keys] of 0 and -inf: what the queries of a tile see of the tiles `first` to `index`."""
    q = torch.arange(index * TILE, (index + 1) * TILE)[:, None]
    k = torch.arange(first * TILE, (index + 1) * TILE)
    seen = k <= q if window is None else (k <= q) & (k > q - window)
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
    return mask.repeat(group, 1)[None, None]


def read_blocks(cache: KVCache, blocks_nb: Tensor, part: str, dtype: torch.dtype) -> Tensor:
    """Keys or values (`part`) of whole blocks, [n, kv_heads, b * block_size, head_dim] in `dtype`."""
    pool: Tensor = getattr(cache, part)
    scales: Tensor | None = getattr(cache, f"{part}_scale")
    n, b = blocks_nb.shape
    flat = blocks_nb.flatten()
    values = pool[flat].to(dtype)
    if scales is not None:
        values.mul_(scales[flat][..., None])
    kv_heads, size, head_dim = pool.shape[1:]
    return values.view(n, b, kv_heads, size, head_dim).transpose(1, 2).reshape(n, kv_heads, b * size, head_dim)


def decode_blocks(query_nHd: Tensor, cache: KVCache, batch: DecodeBlocks, scale: float) -> Tensor:
    """Single queries, float32 [n, heads, head_dim]: they go to the blocks, not the blocks to them.

    A block is read once, where it lies, and multiplied with all queries that look at it; softmax is taken with the
    maximum over all of a query's blocks, and the blocks' partial sums are added in the sequence's order.
    """
    n, heads, head_dim = query_nHd.shape
    query = (query_nHd * scale)[batch.owner]
    scores = _by_users(cache, batch, "key", query)
    scores[batch.edges] = scores[batch.edges].masked_fill_(batch.hidden, float("-inf"))
    most = scores.amax(-1)[batch.table].amax(1)
    weights = scores.sub_(most[batch.owner][..., None]).exp_()
    norm = _sum_in_order(weights.sum(-1), batch)
    partial = _by_users(cache, batch, "value", weights).flatten(1)
    return _sum_in_order(partial, batch).view(n, heads, head_dim).div_(norm[..., None])


def _by_users(cache: KVCache, batch: DecodeBlocks, part: str, rows_eHX: Tensor) -> Tensor:
    """Each entry's rows by the keys, or the values, of its block: [e, heads, block_size or head_dim]."""
    ends = np.cumsum([users.queries.numel() for users in batch.users])
    products = [
        _by_blocks(cache, users, part, rows_eHX[end - users.queries.numel() : end])
        for users, end in zip(batch.users, ends.tolist(), strict=True)
    ]
    return products[0] if len(products) == 1 else torch.cat(products)


def _by_blocks(cache: KVCache, users: BlockUsers, part: str, rows_eHX: Tensor) -> Tensor:
    pool: Tensor = getattr(cache, part)
    scales: Tensor | None = getattr(cache, f"{part}_scale")
    (b, u), (heads, width) = users.queries.shape, rows_eHX.shape[1:]
    kv_heads, size, head_dim = pool.shape[1:]
    matrix = pool[users.blocks].float().view(b * kv_heads, size, head_dim)
    # The query heads that share a head of keys, of all queries of a block, stand below each other.
    rows = rows_eHX.view(b, u, kv_heads, heads // kv_heads, width).transpose(1, 2)
    scale = None if scales is None else scales[users.blocks][:, :, None, None]
    if part == "value" and scale is not None:
        rows = rows * scale
    rows = rows.reshape(b * kv_heads, u * heads // kv_heads, width)
    product = _bmm(rows, matrix.transpose(1, 2) if part == "key" else matrix)
    product = product.view(b, kv_heads, u, heads // kv_heads, -1)
    if part == "key" and scale is not None:
        product = product * scale
    return product.transpose(1, 2).reshape(b * u, heads, -1)


def _bmm(rows_bMK: Tensor, matrix_bKN: Tensor) -> Tensor:
    """Products whose bits do not depend on M, nor on how many they are: single ones, and those of fewer rows than
    `LEAST_ROWS`, have other kernels in MKL, and are filled up."""
    b, m, _ = rows_bMK.shape
    if m < LEAST_ROWS:
        rows_bMK = F.pad(rows_bMK, (0, 0, 0, LEAST_ROWS - m))
    if b == 1:
        rows_bMK, matrix_bKN = rows_bMK.expand(2, -1, -1), matrix_bKN.expand(2, -1, -1)
    return torch.bmm(rows_bMK, matrix_bKN)[:b, :m].contiguous()


def _sum_in_order(partial_eX: Tensor, batch: DecodeBlocks) -> Tensor:
    """Sums [n, X] of each query's blocks, one after the other: an embedding bag adds in the order of its indices."""
    return F.embedding_bag(batch.order, partial_eX, batch.offsets, mode="sum", include_last_offset=True)
