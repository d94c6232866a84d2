"""`plan_attention` turns a ragged batch into a list of work items: one tile of queries by one range of keys each.

The list holds all that distinguishes one kind of attention from another, so one kernel serves them all. A long context
becomes several items with the same queries. A shared prefix becomes items whose queries come from many sequences. A
window becomes a range of keys that starts late. Where a token has several items, each writes a partial result, and the
partials are merged afterwards.
"""

from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchinfer.kernels.ragged import Ints, indices_within, offsets_of
from batchinfer.kernels.ragged_attention import RaggedBatch

ITEM = 8
"""Number of int32 fields of an item: those of `Column`, and an unused one."""

ITEMS_PER_PROCESSOR = 4
"""Work items wanted per multiprocessor: while one waits for memory, another computes. Long contexts are split to
reach this number."""


class Column(IntEnum):
    """The fields of an item, in the order in which the kernel reads them."""

    ROW = 0  # the row of its first token among the step's tokens
    COUNT = 1  # the number of its tokens
    BLOCKS = 2  # where its sequence's blocks begin in the flattened block table
    START = 3  # its first key
    END = 4  # the end of its keys
    POSITION = 5  # the position of its first token: later keys are hidden from that token
    PARTIAL = (
        6  # the index of the partial that it computes for its tokens; -1: it is their only item and writes the output
    )


@dataclass(frozen=True)
class Tile:
    """The number of queries and keys that are multiplied at a time, and Triton's launch options for that."""

    rows: int  # query rows: tokens times the query heads that share a key head; a power of two
    keys: int  # a power of two
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Tiling:
    """The tiles to choose from (each kind is one launch), and how ranges of keys are split."""

    few: Tile  # for sequences whose new tokens all fit in one tile
    many: Tile  # for the other sequences
    same: Tile  # for all sequences, where a row's bits must not depend on the batch
    split: int = 2048  # keys of an item with `same`, on a grid from the sequence's start; a multiple of each tile's
    least: int = 256  # the fewest keys of an item when a context is split for `few` or `many`


@dataclass(frozen=True)
class AttentionPlan:
    """A step's work items, for the layers that have this window. All tensors are int32 on the KV cache's device."""

    window: int | None
    table: Tensor  # [S, most], the batch's block table
    launches: tuple[tuple[Tile, Tensor], ...]  # items [n, ITEM] by tile, those with the most keys first
    first: Tensor  # [tokens + 1], where each token's partials begin; a token with one item has none
    merged: Tensor  # [m], the tokens that have partials
    partials: int  # number of partials of all tokens, float32 [heads, head_dim] each

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences. The step's tokens after these are padding."""
        return len(self.first) - 1


@dataclass(frozen=True)
class _Work:
    """n items before their keys are split; every field is a column [n]."""

    row: Ints
    count: Ints
    sequence: Ints  # the sequence whose blocks are read
    start: Ints
    end: Ints
    position: Ints
    wide: NDArray[np.bool_]  # True: takes the tile for many tokens


@dataclass(frozen=True)
class _Layout:
    """What is kept of a step's plan for the next step."""

    batch: RaggedBatch
    shared: Ints  # [S], as `_shared_keys` returns it
    leader: Ints  # [S]
    own: _Work
    common: _Work


@dataclass(frozen=True)
class _Segments:
    """What is kept of a step's n items: all but where their keys begin and end."""

    of: Ints  # [n], index of the work
    items: NDArray[np.int32]  # [n, ITEM], the columns that depend on contexts are empty
    wide: NDArray[np.bool_]  # [n]
    first: Tensor  # as in the plan
    merged: Tensor
    partials: int


class AttentionPlanner:
    """Plans the attention of one step after another, for the layers with one window.

    A step mostly has as many sequences as the one before it, with as many new tokens, and their keys are cut into as
    many segments: then only where keys begin and end is computed anew. A plan does not depend on what is kept.
    """

    def __init__(self, heads: int, kv_heads: int, window: int | None, tiling: Tiling, processors: int | None) -> None:
        """Take the model's shape. `processors` is the number of multiprocessors to keep busy; None keeps a token's bits
        free of the batch."""
        self.group, self.kv_heads, self.window = heads // kv_heads, kv_heads, window
        self.tiling, self.processors = tiling, processors
        self._layout: _Layout | None = None
        self._segments: _Segments | None = None

    def plan(self, batch: RaggedBatch) -> AttentionPlan:
        """List the work items of a step. Raises as `plan_attention` does."""
        group, window, tiling, fixed = self.group, self.window, self.tiling, self.processors is None
        _check(batch, group, window, tiling)
        layout = self._layout = self._moved(batch) or self._laid_out(batch)
        own, common = layout.own, layout.common
        work = _together(own, common) if len(common.row) else own
        of, start, end = _split(work, self.kv_heads, tiling, self.processors)
        kept = self._segments
        if kept is None or not np.array_equal(kept.of, of):
            kept = self._segments = _segments(layout, work, of)

        items_nX = kept.items.copy()
        items_nX[:, Column.BLOCKS] = work.sequence[of] * batch.table.shape[1]
        items_nX[:, Column.START], items_nX[:, Column.END] = start, end
        items_nX[:, Column.POSITION] = work.position[of]
        order = np.argsort(start - end, kind="stable")
        wide = kept.wide[order]

        device = batch.table.device
        launches = ((tiling.same if fixed else tiling.few, order[~wide]), (tiling.many, order[wide]))
        return AttentionPlan(
            window=window,
            table=batch.table,
            launches=tuple((tile, _tensor(items_nX[chosen], device)) for tile, chosen in launches if len(chosen)),
            first=kept.first,
            merged=kept.merged,
            partials=kept.partials,
        )

    def _laid_out(self, batch: RaggedBatch) -> _Layout:
        self._segments = None
        fixed = self.processors is None
        # Only whole cells of the fixed grid are shared, so that the partials are the same with and without a prefix.
        shared, leader = _shared_keys(batch, self.tiling.split if fixed else 1)
        own = _own_work(batch, shared, self.group, self.window, self.tiling, fixed)
        common = _common_work(batch, shared, leader, self.group, self.tiling, fixed)
        return _Layout(batch, shared, leader, own, common)

    def _moved(self, batch: RaggedBatch) -> _Layout | None:
        """Return the last step's layout with the contexts of this one; None if their tokens are laid out otherwise."""
        last = self._layout
        if (
            last is None
            or last.batch.prefixes != batch.prefixes
            or not np.array_equal(last.batch.offsets, batch.offsets)
        ):
            return None
        own = last.own
        more = (batch.contexts - last.batch.contexts)[own.sequence]
        start, position = own.start, own.position + more
        if self.window is not None:
            start = np.maximum(position + 1 - self.window, 0)
        return replace(last, batch=batch, own=replace(own, start=start, end=own.end + more, position=position))


def plan_attention(
    batch: RaggedBatch, heads: int, kv_heads: int, window: int | None, tiling: Tiling, processors: int | None
) -> AttentionPlan:
    """List the work items of one step's attention.

    `processors` is the number of multiprocessors to keep busy. With None a token's bits do not depend on the batch.

    Raises `ValueError` for a shared prefix together with a window, because its sequences then see different keys; for
    a prefix that ends after the first new token of one of its sequences; and for more query heads per key head than a
    tile has rows.
    """
    return AttentionPlanner(heads, kv_heads, window, tiling, processors).plan(batch)


def _together(own: _Work, common: _Work) -> _Work:
    return _Work(*(np.concatenate([getattr(w, name) for w in (own, common)]) for name in _Work.__annotations__))


def _segments(layout: _Layout, work: _Work, of: Ints) -> _Segments:
    """Return what a step's items have in common with those of later steps; `of` [n] is the work of each."""
    batch, own, common = layout.batch, layout.own, layout.common
    before, of_token = _count_partials(batch, own, common, layout.leader, np.bincount(of, minlength=len(work.row)))
    partial = np.arange(len(of)) - np.searchsorted(of, of)  # the item's index among the segments of its work
    partial += np.concatenate([before[own.sequence], np.zeros_like(common.row)])[of]
    partial[of_token[work.row[of]] == 1] = -1
    items_nX = np.zeros((len(of), ITEM), np.int32)
    items_nX[:, Column.ROW], items_nX[:, Column.COUNT] = work.row[of], work.count[of]
    items_nX[:, Column.PARTIAL] = partial
    device = batch.table.device
    first = offsets_of(np.where(of_token > 1, of_token, 0))
    return _Segments(
        of=of,
        items=items_nX,
        wide=work.wide[of],
        first=_tensor(first, device),
        merged=_tensor(np.flatnonzero(of_token > 1), device),
        partials=int(first[-1]),
    )


def _check(batch: RaggedBatch, group: int, window: int | None, tiling: Tiling) -> None:
    if window is not None and batch.prefixes:
        raise ValueError(f"a window of {window} and a shared prefix: the prefix's sequences would see different keys")
    computed = batch.contexts - np.diff(batch.offsets)
    for p in batch.prefixes:
        if (bound := int(computed[p.first : p.first + p.count].min())) < p.keys:
            raise ValueError(f"a shared prefix has {p.keys} keys, but a sequence's new tokens begin at {bound}")
    if (rows := min(tile.rows for tile in (tiling.few, tiling.many, tiling.same))) < group:
        raise ValueError(f"{group} query heads share a key head, but a tile has {rows} rows and takes no more heads")


def _shared_keys(batch: RaggedBatch, multiple: int) -> tuple[Ints, Ints]:
    """Return (shared keys [S], leaders [S]).

    A sequence's shared keys are those of its prefix, rounded down to a `multiple`; its leader is the first sequence
    that has this prefix, or itself.
    """
    shared, leader = np.zeros(len(batch.contexts), np.int64), np.arange(len(batch.contexts))
    for p in batch.prefixes:
        shared[p.first : p.first + p.count] = p.keys // multiple * multiple
        leader[p.first : p.first + p.count] = p.first
    return shared, leader


def _own_work(batch: RaggedBatch, shared: Ints, group: int, window: int | None, tiling: Tiling, fixed: bool) -> _Work:
    """List the work of each sequence's new tokens by the keys after its shared prefix."""
    lengths = np.diff(batch.offsets)
    wide, tokens = _tile_tokens(lengths, group, tiling, fixed)
    sequence, begin, count = _cut(lengths, tokens)
    position = (batch.contexts - lengths)[sequence] + begin
    start = shared[sequence] if window is None else np.maximum(position + 1 - window, 0)
    return _Work(
        batch.offsets[:-1][sequence] + begin, count, sequence, start, position + count, position, wide[sequence]
    )


def _common_work(batch: RaggedBatch, shared: Ints, leader: Ints, group: int, tiling: Tiling, fixed: bool) -> _Work:
    """List the work of each shared prefix: its keys by the new tokens of all its sequences, which see all of them."""
    leaders, members = np.unique(leader[shared > 0], return_counts=True)
    rows = batch.offsets[leaders]
    lengths = batch.offsets[leaders + members] - rows
    wide, tokens = _tile_tokens(lengths, group, tiling, fixed)
    prefix, begin, count = _cut(lengths, tokens)
    sequence = leaders[prefix]
    end = shared[sequence]
    return _Work(rows[prefix] + begin, count, sequence, np.zeros_like(end), end, end, wide[prefix])


def _tile_tokens(lengths: Ints, group: int, tiling: Tiling, fixed: bool) -> tuple[NDArray[np.bool_], Ints]:
    """Return, for runs of tokens of these lengths, (takes the tile for many, tokens that fit in the run's tile)."""
    wide = lengths * group > tiling.few.rows
    rows = np.where(wide, tiling.many.rows, tiling.few.rows)
    if fixed:
        wide, rows = np.zeros_like(wide), np.full_like(rows, tiling.same.rows)
    return wide, rows // group


def _split(work: _Work, kv_heads: int, tiling: Tiling, processors: int | None) -> tuple[Ints, Ints, Ints]:
    """Split the work's keys into segments: (index of the work, first key, end of keys), in order.

    Segments meet on the grid of the tiles' keys, which begins at the sequence's start.
    """
    grid = tiling.split if processors is None else max(tile.keys for tile in (tiling.few, tiling.many))
    base = work.start // grid * grid
    keys = work.end - base
    if processors is None:
        size = np.full_like(keys, tiling.split)
    else:
        fair = int(keys.sum()) * kv_heads // (processors * ITEMS_PER_PROCESSOR)
        segments = -(-keys // max(fair, tiling.least))
        size = -(-keys // (segments * grid)) * grid
    of, begin, count = _cut(keys, size)
    begin += base[of]
    return of, np.maximum(begin, work.start[of]), begin + count


def _count_partials(batch: RaggedBatch, own: _Work, common: _Work, leader: Ints, segments: Ints) -> tuple[Ints, Ints]:
    """Return (partials of each of a sequence's tokens from its shared prefix [S], partials of each token [tokens]).

    `segments` is the number of segments of each work: that of `own` first, then that of `common`. A token's partials
    from its prefix come before those from its own keys.
    """
    by_leader = np.zeros_like(leader)
    by_leader[common.sequence] = segments[len(own.row) :]  # equal for all tiles of a prefix: they have the same keys
    before = by_leader[leader]
    lengths = np.diff(batch.offsets)
    return before, np.repeat(before, lengths) + np.repeat(segments[: len(own.row)], own.count)


def _cut(lengths: Ints, most: Ints) -> tuple[Ints, Ints, Ints]:
    """Cut runs of these lengths into segments of `most`, the last of a run being shorter.

    Returns (index of the run, begin within the run, length) of each segment, in order.
    """
    segments = -(-lengths // most)
    run = np.repeat(np.arange(len(lengths)), segments)
    begin = indices_within(segments) * most[run]
    return run, begin, np.minimum(most[run], lengths[run] - begin)


def _tensor(array: NDArray[np.integer], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.int32)).to(device)
