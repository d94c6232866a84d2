"""The order in which rows run: prompts that begin alike are neighbours, as the engine shares what neighbours share."""

import numpy as np
from numpy.typing import NDArray

from batchinfer.jobs.rows.token_file import StoredRequests
from batchinfer.kernels.grain import TILE
from batchinfer.kernels.ragged import Ints

HASHED_ROWS = 1 << 15  # whose tiles are in memory at a time


def depth_first(prompts: StoredRequests, chosen: Ints) -> Ints:
    """The places `chosen` in the order to run.

    That is depth-first through the tree of whole tiles: rows with the same first tile side by side, among them those
    with the same second one, and so on, as far as `shareable_tiles` goes. Branches come by their longest prompt,
    longest first, so that the long ones do not end up alone at the end; of one length, as they are in `chosen`. Tiles
    are compared by their hashes: a collision costs speed and nothing else.
    """
    starts, lengths = prompts.starts[chosen], prompts.lengths[chosen]
    tiles = shareable_tiles(lengths)
    group = np.zeros(len(chosen), np.int64)  # of each row, as the place in the order at which it begins
    open_rows = np.arange(len(chosen))  # those in groups of more than one
    level = 0
    while len(open_rows):
        key = np.arange(len(open_rows)).astype(np.uint64)  # a row without a further tile is a branch of its own
        further = np.flatnonzero(tiles[open_rows] > level)
        key[further] = _hashes(prompts.token_ids, starts[open_rows[further]] + TILE * level)
        group[open_rows], sizes = _branches(group[open_rows], key, lengths[open_rows])
        open_rows = open_rows[sizes > 1]
        level += 1
    order = np.empty_like(chosen)
    order[group] = chosen
    return order


def shareable_tiles(lengths: Ints) -> Ints:
    """How many tiles of prompts of these lengths another one may share: the last one, whole or not, is its own."""
    return (lengths - 1) // TILE


def shared_tiles(prompts: StoredRequests, order: Ints) -> Ints:
    """[n - 1] how many tiles each row but the first of the order shares with the one before it."""
    starts, tiles = prompts.starts[order], shareable_tiles(prompts.lengths[order])
    most = np.minimum(tiles[1:], tiles[:-1])
    shared = np.zeros(len(most), np.int64)
    equal = np.flatnonzero(most)  # up to this level, and with a further tile
    level = 0
    while len(equal):
        at = TILE * level
        same = [
            (_tiles(prompts.token_ids, starts[rows] + at) == _tiles(prompts.token_ids, starts[rows + 1] + at)).all(1)
            for rows in _some(equal)
        ]
        equal = equal[np.concatenate(same)]
        level += 1
        shared[equal] = level
        equal = equal[most[equal] > level]
    return shared


def _branches(group: Ints, key: NDArray[np.uint64], lengths: Ints) -> tuple[Ints, Ints]:
    """Groups split by key: ([n] each row's new group, [n] how many rows are in it)."""
    by_key = np.lexsort((key, group))
    begins = np.flatnonzero(_changes(group[by_key]) | _changes(key[by_key]))
    sizes = np.diff(begins, append=len(group))
    parent, longest = group[by_key[begins]], np.maximum.reduceat(lengths[by_key], begins)
    first = by_key[begins]  # lexsort keeps rows of one branch in their order
    ranked = np.lexsort((first, -longest, parent))
    ahead = np.cumsum(sizes[ranked]) - sizes[ranked]
    families = np.flatnonzero(_changes(parent[ranked]))
    ahead -= np.repeat(ahead[families], np.diff(families, append=len(ranked)))
    places = np.empty_like(ahead)
    places[ranked] = parent[ranked] + ahead
    new, rows = np.empty_like(group), np.empty_like(group)
    new[by_key], rows[by_key] = np.repeat(places, sizes), np.repeat(sizes, sizes)
    return new, rows


def _changes(values: NDArray[np.generic]) -> NDArray[np.bool_]:
    """[n] where another value begins."""
    return np.concatenate(([True], values[1:] != values[:-1]))


def _hashes(token_ids: NDArray[np.int32], starts: Ints) -> NDArray[np.uint64]:
    """[n] of the tiles that begin there."""
    weights = np.random.default_rng(0).integers(0, 1 << 64, TILE, np.uint64) | np.uint64(1)
    hashed = [_tiles(token_ids, some).astype(np.uint64) @ weights for some in _some(starts)]
    return np.concatenate(hashed) if hashed else np.zeros(0, np.uint64)


def _tiles(token_ids: NDArray[np.int32], starts: Ints) -> NDArray[np.int32]:
    """[n, TILE] the tiles that begin there."""
    tiles: NDArray[np.int32] = token_ids[starts[:, None] + np.arange(TILE)]
    return tiles


def _some(values: Ints) -> list[Ints]:
    """The same values, as many at a time as memory is meant to hold tiles."""
    return [values[first : first + HASHED_ROWS] for first in range(0, len(values), HASHED_ROWS)]
