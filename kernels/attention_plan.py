"""`plan_attention`: a ragged batch as a list of work, each item one tile of queries by one range of keys.

All that tells the kinds of attention apart is in this list. A long context is several items for the same queries, a
shared prefix is items whose queries are those of many sequences, a window is a range that starts late; the kernel
knows none of it. Where a token has more than one item, each leaves a partial result, and the partials are merged.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchinfer.kernels.ragged import Ints, offsets_of, places_in_rows
from batchinfer.kernels.ragged_attention import RaggedBatch

ITEM = 8
"""int32 numbers of an item: those of `Column`, and one that is nothing."""

ITEMS_PER_PROCESSOR = 4
"""Contexts are split until there are so many for each multiprocessor: they hide each other's waiting."""


class Column(IntEnum):
    """What the numbers of an item are, in the order in which the kernel reads them."""

    ROW = 0  # the first of its tokens in the step
    COUNT = 1  # of its tokens
    BLOCKS = 2  # where its blocks begin in the flat table
    START = 3  # its first key
    END = 4  # of its keys
    POSITION = 5  # of its first token, behind which keys are hidden from it
    PARTIAL = 6  # which of its tokens' partials it computes; -1: it is their only item, and writes the output itself


@dataclass(frozen=True)
class Tile:
    """Queries and keys that are multiplied at a time, and how a GPU does it."""

    rows: int  # queries: tokens times the query heads that share a head of keys; a power of two
    keys: int  # a power of two
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Tiling:
    """The tiles of one launch each, and how ranges of keys are cut; `split` is a multiple of every tile's keys."""

    few: Tile  # for sequences whose new tokens all fit in one
    many: Tile  # for the others
    same: Tile  # for all of them, where a row's bits must not depend on the batch
    split: int = 2048  # keys of an item in that case, on a grid from the sequence's start
    least: int = 256  # keys that an item of a split context has at least, else


@dataclass(frozen=True)
class AttentionPlan:
    """What the kernels read of a step, in the layers that have this window. The tensors are int32, beside the pool."""

    window: int | None
    table: Tensor  # [S, most], the batch's
    launches: tuple[tuple[Tile, Tensor], ...]  # items [n, ITEM], those with most keys first
    first: Tensor  # [tokens + 1], where each token's partials begin; a token with one item has none
    merged: Tensor  # [m], the tokens that have partials
    partials: int  # of all tokens, float32 [heads, head_dim] each

    @property
    def tokens(self) -> int:
        """Of all sequences; what follows in a step is padding."""
        return len(self.first) - 1


@dataclass(frozen=True)
class _Work:
    """n items before their keys are split: columns [n]."""

    row: Ints
    count: Ints
    sequence: Ints  # whose blocks are read
    start: Ints
    end: Ints
    position: Ints
    wide: NDArray[np.bool_]  # whether the tile is that for many tokens


def plan_attention(
    batch: RaggedBatch, heads: int, kv_heads: int, window: int | None, tiling: Tiling, processors: int | None
) -> AttentionPlan:
    """`processors`: multiprocessors that are to be kept busy; None: a token's bits do not depend on the batch.

    `ValueError` for a prefix under a window, whose sequences see different keys; for one that ends behind a new token
    of its sequences; and for more query heads to a head of keys than a tile has rows.
    """
    group = heads // kv_heads
    _check(batch, group, window, tiling)
    fixed = processors is None
    # Only whole pieces of the fixed grid are shared, so that with and without a prefix the partials are the same.
    shared, leader = _shared_keys(batch, tiling.split if fixed else 1)
    own = _own_work(batch, shared, group, window, tiling, fixed)
    common = _common_work(batch, shared, leader, group, tiling, fixed)
    work = _Work(*(np.concatenate([getattr(w, name) for w in (own, common)]) for name in _Work.__annotations__))
    of, start, end = _split(work, kv_heads, tiling, processors)
    before, of_token = _count_partials(batch, own, common, leader, np.bincount(of, minlength=len(work.row)))

    partial = np.arange(len(of)) - np.searchsorted(of, of)  # of its work's pieces
    partial += np.concatenate([before[own.sequence], np.zeros_like(common.row)])[of]
    partial[of_token[work.row[of]] == 1] = -1
    blocks = work.sequence * batch.table.shape[1]
    columns = {
        Column.ROW: work.row[of],
        Column.COUNT: work.count[of],
        Column.BLOCKS: blocks[of],
        Column.START: start,
        Column.END: end,
        Column.POSITION: work.position[of],
        Column.PARTIAL: partial,
    }
    items_nX = np.zeros((len(of), ITEM), np.int64)
    items_nX[:, list(columns)] = np.stack(list(columns.values()), 1)
    order = np.argsort(start - end, kind="stable")
    items_nX, wide = items_nX[order], work.wide[of][order]

    device = batch.table.device
    launches = ((tiling.same if fixed else tiling.few, items_nX[~wide]), (tiling.many, items_nX[wide]))
    first = offsets_of(np.where(of_token > 1, of_token, 0))
    return AttentionPlan(
        window=window,
        table=batch.table,
        launches=tuple((tile, _tensor(chosen, device)) for tile, chosen in launches if len(chosen)),
        first=_tensor(first, device),
        merged=_tensor(np.flatnonzero(of_token > 1), device),
        partials=int(first[-1]),
    )


def _check(batch: RaggedBatch, group: int, window: int | None, tiling: Tiling) -> None:
    if window is not None and batch.prefixes:
        raise ValueError(f"a window of {window} and a shared prefix: its sequences see different keys of it")
    computed = batch.contexts - np.diff(batch.offsets)
    for p in batch.prefixes:
        if (bound := int(computed[p.first : p.first + p.count].min())) < p.keys:
            raise ValueError(f"a shared prefix has {p.keys} keys, but a sequence's new tokens begin at {bound}")
    if (rows := min(tile.rows for tile in (tiling.few, tiling.many, tiling.same))) < group:
        raise ValueError(f"{group} query heads to a head of keys; a tile has {rows} rows and takes no more heads")


def _shared_keys(batch: RaggedBatch, grain: int) -> tuple[Ints, Ints]:
    """For each sequence ([S] each): keys that are computed with others', and the first sequence of those others."""
    shared, leader = np.zeros(len(batch.contexts), np.int64), np.arange(len(batch.contexts))
    for p in batch.prefixes:
        shared[p.first : p.first + p.count] = p.keys // grain * grain
        leader[p.first : p.first + p.count] = p.first
    return shared, leader


def _own_work(batch: RaggedBatch, shared: Ints, group: int, window: int | None, tiling: Tiling, fixed: bool) -> _Work:
    """Each sequence's new tokens by the keys behind its prefix."""
    lengths = np.diff(batch.offsets)
    wide, tokens = _tile_tokens(lengths, group, tiling, fixed)
    sequence, begin, count = _cut(lengths, tokens)
    position = (batch.contexts - lengths)[sequence] + begin
    start = shared[sequence] if window is None else np.maximum(position + 1 - window, 0)
    return _Work(
        batch.offsets[:-1][sequence] + begin, count, sequence, start, position + count, position, wide[sequence]
    )


def _common_work(batch: RaggedBatch, shared: Ints, leader: Ints, group: int, tiling: Tiling, fixed: bool) -> _Work:
    """The new tokens of all sequences of a prefix by its keys, which all of them see."""
    leaders, members = np.unique(leader[shared > 0], return_counts=True)
    rows = batch.offsets[leaders]
    lengths = batch.offsets[leaders + members] - rows
    wide, tokens = _tile_tokens(lengths, group, tiling, fixed)
    prefix, begin, count = _cut(lengths, tokens)
    sequence = leaders[prefix]
    end = shared[sequence]
    return _Work(rows[prefix] + begin, count, sequence, np.zeros_like(end), end, end, wide[prefix])


def _tile_tokens(lengths: Ints, group: int, tiling: Tiling, fixed: bool) -> tuple[NDArray[np.bool_], Ints]:
    """Whether runs of tokens take the tile for many, and how many tokens fit in the tile they take."""
    wide = lengths * group > tiling.few.rows
    rows = np.where(wide, tiling.many.rows, tiling.few.rows)
    if fixed:
        wide, rows = np.zeros_like(wide), np.full_like(rows, tiling.same.rows)
    return wide, rows // group


def _split(work: _Work, kv_heads: int, tiling: Tiling, processors: int | None) -> tuple[Ints, Ints, Ints]:
    """Pieces of the work's keys: (which work, first key, end of keys), in order. They meet on the grid of tiles."""
    grid = tiling.split if processors is None else max(tile.keys for tile in (tiling.few, tiling.many))
    base = work.start // grid * grid
    keys = work.end - base
    if processors is None:
        size = np.full_like(keys, tiling.split)
    else:
        fair = int(keys.sum()) * kv_heads // (processors * ITEMS_PER_PROCESSOR)
        pieces = -(-keys // max(fair, tiling.least))
        size = -(-keys // (pieces * grid)) * grid
    of, begin, count = _cut(keys, size)
    begin += base[of]
    return of, np.maximum(begin, work.start[of]), begin + count


def _count_partials(batch: RaggedBatch, own: _Work, common: _Work, leader: Ints, pieces: Ints) -> tuple[Ints, Ints]:
    """(partials of a token that come from its sequence's prefix [S], partials of a token in all [tokens]).

    `pieces` is how many pieces each work has become, own ones first; a token's own partials come behind its prefix's.
    """
    by_leader = np.zeros_like(leader)
    by_leader[common.sequence] = pieces[len(own.row) :]  # the same for all tiles of a prefix: their keys are
    before = by_leader[leader]
    lengths = np.diff(batch.offsets)
    return before, np.repeat(before, lengths) + np.repeat(pieces[: len(own.row)], own.count)


def _cut(lengths: Ints, most: Ints) -> tuple[Ints, Ints, Ints]:
    """Runs cut into pieces of `most`, the last one shorter: (which run, where in it, how long), in order."""
    pieces = -(-lengths // most)
    run = np.repeat(np.arange(len(lengths)), pieces)
    begin = places_in_rows(pieces) * most[run]
    return run, begin, np.minimum(most[run], lengths[run] - begin)


def _tensor(array: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.int32)).to(device)
