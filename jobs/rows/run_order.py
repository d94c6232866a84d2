"""The order in which rows run. Prompts that begin alike are neighbours, since the engine computes their common start
once."""

import numpy as np
from numpy.typing import NDArray

from batchinfer.jobs.rows.token_file import StoredRequests
from batchinfer.kernels.grain import TILE
from batchinfer.kernels.ragged import Ints

HASHED_ROWS = 1 << 15  # most rows whose tiles are in memory at a time


def depth_first(prompts: StoredRequests, chosen: Ints, grain: int = TILE) -> Ints:
    """Return the row indices `chosen` in the order to run.

    The order is depth-first through the tree of whole tiles of `grain` tokens: rows with the same first tile are
    neighbours, among them rows with the same second tile, and so on, as far as `shareable_tiles` allows. The branch
    with the longest prompt comes first, so that long prompts do not run alone at the end. Branches of equal length keep
    the order of `chosen`.
    Tiles are compared by their hashes. A collision makes the job slower, but not wrong.
    """
    starts, lengths = prompts.starts[chosen], prompts.lengths[chosen]
    tiles = shareable_tiles(lengths, grain)
    group = np.zeros(len(chosen), np.int64)  # each row's group, named by the position in the order at which it begins
    open_rows = np.arange(len(chosen))  # rows in groups of more than one row
    level = 0
    while len(open_rows):
        key = np.arange(len(open_rows)).astype(np.uint64)  # a row without another tile is a branch of its own
        further = np.flatnonzero(tiles[open_rows] > level)
        key[further] = _hashes(prompts.token_ids, starts[open_rows[further]] + grain * level, grain)
        group[open_rows], sizes = _branches(group[open_rows], key, lengths[open_rows])
        open_rows = open_rows[sizes > 1]
        level += 1
    order = np.empty_like(chosen)
    order[group] = chosen
    return order


def shareable_tiles(lengths: Ints, grain: int = TILE) -> Ints:
    """Return how many tiles prompts of these lengths can share with others: all but the last, whole or not."""
    return (lengths - 1) // grain


def shared_tiles(prompts: StoredRequests, order: Ints, grain: int = TILE) -> Ints:
    """Return how many tiles each row of the order, but the first, shares with the row before it [n - 1]."""
    starts, tiles = prompts.starts[order], shareable_tiles(prompts.lengths[order], grain)
    most = np.minimum(tiles[1:], tiles[:-1])
    shared = np.zeros(len(most), np.int64)
    ids, equal = prompts.token_ids, np.flatnonzero(most)  # pairs that are equal up to this level and have another tile
    level = 0
    while len(equal):
        at = grain * level
        same = [
            (_tiles(ids, starts[rows] + at, grain) == _tiles(ids, starts[rows + 1] + at, grain)).all(1)
            for rows in _some(equal)
        ]
        equal = equal[np.concatenate(same)]
        level += 1
        shared[equal] = level
        equal = equal[most[equal] > level]
    return shared


def _branches(group: Ints, key: NDArray[np.uint64], lengths: Ints) -> tuple[Ints, Ints]:
    """Split groups by key. Returns (each row's new group [n], the number of rows in it [n])."""
    by_key = np.lexsort((key, group))
    begins = np.flatnonzero(_changes(group[by_key]) | _changes(key[by_key]))
    sizes = np.diff(begins, append=len(group))
    parent, longest = group[by_key[begins]], np.maximum.reduceat(lengths[by_key], begins)
    first = by_key[begins]  # lexsort is stable, so this is the branch's first row
    ranked = np.lexsort((first, -longest, parent))
    ahead = np.cumsum(sizes[ranked]) - sizes[ranked]
    families = np.flatnonzero(_changes(parent[ranked]))
    ahead -= np.repeat(ahead[families], np.diff(families, append=len(ranked)))
    begin = np.empty_like(ahead)
    begin[ranked] = parent[ranked] + ahead
    new, rows = np.empty_like(group), np.empty_like(group)
    new[by_key], rows[by_key] = np.repeat(begin, sizes), np.repeat(sizes, sizes)
    return new, rows


def _changes(values: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Return whether each value differs from the value before it [n]; true for the first."""
    return np.concatenate(([True], values[1:] != values[:-1]))


def _hashes(token_ids: NDArray[np.int32], starts: Ints, grain: int) -> NDArray[np.uint64]:
    """Return the hashes of the tiles that begin at `starts` [n]."""
    weights = np.random.default_rng(0).integers(0, 1 << 64, grain, np.uint64) | np.uint64(1)
    hashed = [_tiles(token_ids, some, grain).astype(np.uint64) @ weights for some in _some(starts)]
    return np.concatenate(hashed) if hashed else np.zeros(0, np.uint64)


def _tiles(token_ids: NDArray[np.int32], starts: Ints, grain: int) -> NDArray[np.int32]:
    """Return the tiles that begin at `starts` [n], as [n, grain]."""
    tiles: NDArray[np.int32] = token_ids[starts[:, None] + np.arange(grain)]
    return tiles


def _some(values: Ints) -> list[Ints]:
    """Split values into runs of at most `HASHED_ROWS`."""
    return [values[first : first + HASHED_ROWS] for first in range(0, len(values), HASHED_ROWS)]
