"""`plan_attention` turns a ragged batch into a list of work items: one tile of queries by one range of keys each.

The list holds all that distinguishes one kind of attention from another, so one kernel serves them all. A long context
becomes several items with the same queries. A shared prefix becomes items whose queries come from many sequences. A
window becomes a range of keys that starts late. Where a token has several items, each writes a partial result, and the
partials are merged afterwards.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchinfer.kernels.ragged import Ints, indices_within, offsets_of, ranges
from batchinfer.kernels.ragged_attention import RaggedBatch

ITEM = 8
"""Number of int32 fields of an item: those of `Column`, and an unused one."""

MOST_WAVES = 8
"""Items are not made so short that the GPU computes more than this many times as many as fit it at once: the last of
so many waves matters little."""


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
    resident: int = 1  # programs that a multiprocessor holds at once: its registers and shared memory are enough


@dataclass(frozen=True)
class Tiling:
    """The tiles to choose from (each kind is one launch), and how ranges of keys are split."""

    few: Tile  # for sequences whose new tokens all fit in one tile
    many: Tile  # for the other sequences
    same: Tile  # for all sequences, where a row's bits must not depend on the batch
    split: int = 2048  # keys of an item with `same`, on a grid from the sequence's start; a multiple of each tile's
    least: int = 128  # the fewest keys of an item when a context is split for `few` or `many`


@dataclass(frozen=True)
class AttentionPlan:
    """A step's work items, for the layers that have this window. All tensors are int32 on the KV cache's device."""

    window: int | None
    table: Tensor  # [S, most], the batch's block table
    # Items [n, ITEM] by tile, those with the most keys first. The tile for few tokens, or for all, comes first, even
    # without items.
    launches: tuple[tuple[Tile, Tensor], ...]
    first: Tensor  # [tokens + 1], where each token's partials begin; a token with one item has none
    merged: Tensor  # [m], the tokens that have partials
    partials: int  # number of partials of all tokens, float32 [heads, head_dim] each
    keys_read: int  # by all items, of one key head
    keys_unshared: int  # what would be read if no prefix were shared
    spare: int  # items that splitting keys usually adds at most, for any batch; 0 where only the lengths tell

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


def plan_attention(
    batch: RaggedBatch, heads: int, kv_heads: int, window: int | None, tiling: Tiling, processors: int | None
) -> AttentionPlan:
    """List the work items of a step's attention.

    `processors` is the number of multiprocessors to keep busy. With None a token's bits do not depend on the batch.

    Raises `ValueError` for a shared prefix together with a window, because its sequences then see different keys; for
    a prefix that ends after the first new token of one of its sequences; and for more query heads per key head than a
    tile has rows.
    """
    group = heads // kv_heads
    _check(batch, group, window, tiling)
    fixed = processors is None
    # Only whole cells of the fixed grid are shared, so that the partials are the same with and without a prefix.
    shared, leader = _shared_keys(batch, tiling.split if fixed else 1)
    own = _own_work(batch, shared, group, window, tiling, fixed)
    common = _common_work(batch, shared, leader, group, tiling, fixed)
    work = _Work(*(np.concatenate([getattr(w, name) for w in (own, common)]) for name in _Work.__annotations__))
    of, start, end = _split(work, kv_heads, tiling, processors)
    before, of_token = _count_partials(batch, own, common, leader, np.bincount(of, minlength=len(work.row)))

    partial = np.arange(len(of)) - np.searchsorted(of, of)  # the item's index among the segments of its work
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
    own_keys = int((own.end - own.start).sum())
    return AttentionPlan(
        window=window,
        table=batch.table,
        launches=tuple((tile, _tensor(chosen, device)) for tile, chosen in launches[: 2 if wide.any() else 1]),
        first=_tensor(first, device),
        merged=_tensor(np.flatnonzero(of_token > 1), device),
        partials=int(first[-1]),
        keys_read=own_keys + int(common.end.sum()),
        keys_unshared=own_keys + int(shared[own.sequence].sum()),
        # As many as two waves: with more, splitting gains little.
        spare=0 if processors is None else 2 * processors * tiling.few.resident // kv_heads + 1,
    )


def _check(batch: RaggedBatch, group: int, window: int | None, tiling: Tiling) -> None:
    if window is not None and batch.prefixes:
        raise ValueError(f"a window of {window} and a shared prefix: the prefix's sequences would see different keys")
    members, _, keys = _members(batch)
    begin = (batch.contexts - np.diff(batch.offsets))[members]
    if (begin < keys).any():
        i = int((begin - keys).argmin())
        raise ValueError(f"a shared prefix has {keys[i]} keys, but a sequence's new tokens begin at {begin[i]}")
    if (rows := min(tile.rows for tile in (tiling.few, tiling.many, tiling.same))) < group:
        raise ValueError(f"{group} query heads share a key head, but a tile has {rows} rows and takes no more heads")


def _shared_keys(batch: RaggedBatch, multiple: int) -> tuple[Ints, Ints]:
    """Return (shared keys [S], leaders [S]).

    A sequence's shared keys are those of its prefix, rounded down to a `multiple`; its leader is the first sequence
    that has this prefix, or itself.
    """
    shared, leader = np.zeros(len(batch.contexts), np.int64), np.arange(len(batch.contexts))
    members, leaders, keys = _members(batch)
    shared[members], leader[members] = keys // multiple * multiple, leaders
    return shared, leader


def _members(batch: RaggedBatch) -> tuple[Ints, Ints, Ints]:
    """Return of the sequences that have a shared prefix: (sequence, first sequence with that prefix, its keys)."""
    first, count, keys = np.array([(p.first, p.count, p.keys) for p in batch.prefixes], np.int64).reshape(-1, 3).T
    return ranges(first, count)[0], np.repeat(first, count), np.repeat(keys, count)


def _own_work(batch: RaggedBatch, shared: Ints, group: int, window: int | None, tiling: Tiling, fixed: bool) -> _Work:
    """List the work of each sequence's new tokens by the keys after its shared prefix."""
    lengths = np.diff(batch.offsets)
    wide, tokens = tile_tokens(lengths, group, tiling, fixed)
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
    wide, tokens = tile_tokens(lengths, group, tiling, fixed)
    prefix, begin, count = _cut(lengths, tokens)
    sequence = leaders[prefix]
    end = shared[sequence]
    return _Work(rows[prefix] + begin, count, sequence, np.zeros_like(end), end, end, wide[prefix])


def tile_tokens(lengths: Ints, group: int, tiling: Tiling, fixed: bool) -> tuple[NDArray[np.bool_], Ints]:
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
    size = np.full_like(keys, tiling.split)
    if processors is not None:
        for tile, chosen in ((tiling.few, ~work.wide), (tiling.many, work.wide)):
            if chosen.any():
                size[chosen] = _even_sizes(keys[chosen], kv_heads, tile, processors * tile.resident, grid, tiling.least)
    of, begin, count = _cut(keys, size)
    begin += base[of]
    return of, np.maximum(begin, work.start[of]), begin + count


def _even_sizes(keys: Ints, kv_heads: int, tile: Tile, places: int, grid: int, least: int) -> Ints:
    """Return, for each work of a launch, the keys of its items: a multiple of `grid`, chosen for the shortest launch.

    The GPU computes items in `places` at once, each in the time of its keys and of its start. A launch lasts as long as
    its longest item at least, and as long as so many whole waves of average items.
    """
    # Starting takes about the time of a tile. A partial is written and read in float32, 8 bytes for each row and
    # number of a head, while a key and its value are 4 in 16 bits.
    start = tile.keys + 2 * tile.rows
    longest, total = int(keys.max()), int(keys.sum()) * kv_heads
    most = max(longest // max(total // (MOST_WAVES * places), least), 1)
    limits = np.unique(-(-longest // (np.arange(1, most + 1) * grid))) * grid
    items = (-(-keys // limits[:, None])).sum(1) * kv_heads
    times = np.maximum(limits + start, -(-items // places) * (total / items + start))
    segments = -(-keys // limits[times.argmin()])
    sizes: Ints = -(-keys // (segments * grid)) * grid
    return sizes


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


def _tensor(array: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.int32)).to(device)
