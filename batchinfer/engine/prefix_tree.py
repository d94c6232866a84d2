"""`PrefixTree`: shares the common start of neighbouring prompts, in whole tiles, so that it is computed once.

The tiles of all prompts form a tree, and rows come in its depth-first order. So only the path to the newest row is
held, and each tile on it only as long as the next row shares it: no tile is evicted that is needed again, and none kept
that is not. The last tile of a prompt is never shared, because its row must compute it to sample the first new token.
Rows with the very same prompt are twins: the prompt is computed for one of them, and the others get copies of its last
blocks.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.request import Requests
from batchinfer.kernels.grain import TILE
from batchinfer.kernels.ragged import Ints, indices_within


@dataclass(eq=False)
class SharedTile:
    """The blocks of `TILE` positions that several sequences begin with, at the same positions."""

    blocks: Ints
    users: int = 0  # sequences that read it
    wanted: bool = True  # the next row to be admitted shares it
    computed: bool = False  # computed, or part of the step that is being scheduled
    spoiled: bool = False  # may hold values that are not finite


class PrefixTree:
    """Holds the shared tiles on the path to the row that was admitted last."""

    def __init__(self, manager: BlockManager, block_size: int) -> None:
        self._manager = manager
        self._blocks_per_tile = TILE // block_size
        self._path: list[SharedTile] = []

    def enter(self, shared: int, shared_by_next: int) -> list[SharedTile]:
        """Return the shared tiles of the next row.

        The first `shared` are those of the row before; the first `shared_by_next` are held for the row after. The
        blocks of new tiles must have been promised.
        """
        new = range(shared, shared_by_next)
        tiles = self._path[:shared] + [SharedTile(self._manager.take(self._blocks_per_tile)) for _ in new]
        assert len(tiles) == max(shared, shared_by_next), "rows came in another order than they were compared in"
        for tile in tiles:
            tile.users += 1
        for tile in tiles[shared_by_next:]:
            tile.wanted = False
        self._path = tiles[:shared_by_next]
        return tiles

    def drop(self) -> Ints:
        """Forget the path, because no next row will come; return the blocks that this frees and that must be wiped."""
        for tile in self._path:
            tile.wanted = False
            tile.users += 1
        path, self._path = self._path, []
        return self.leave(path)

    def leave(self, tiles: list[SharedTile]) -> Ints:
        """Release the tiles of a sequence that ends; return the blocks that this frees and that must be wiped."""
        wiped = [np.empty(0, np.int64)]
        for tile in tiles:
            tile.users -= 1
            if not tile.users and not tile.wanted:
                self._manager.release(tile.blocks, len(tile.blocks))
                wiped += [tile.blocks] if tile.spoiled else []
        return np.concatenate(wiped)


@dataclass(frozen=True)
class Likeness:
    """What each of n rows has in common with the row before it."""

    tiles: Ints  # [n] number of tiles that may be shared
    twins: NDArray[np.bool_]  # [n] True if the prompts are the same

    @classmethod
    def none(cls, rows: int) -> "Likeness":
        """Return the likeness of `rows` rows that share nothing."""
        return cls(np.zeros(rows, np.int64), np.zeros(rows, np.bool_))


def likeness(requests: Requests) -> Likeness:
    """Compare the tokens of neighbouring requests and return what they have in common."""
    lengths = np.diff(requests.offsets)
    same = _common_tokens(requests)
    before = np.concatenate([lengths[:1], lengths[:-1]])
    tiles = np.minimum(same, np.minimum(lengths, before) - 1) // TILE
    return Likeness(tiles, (same == lengths) & (lengths == before))


def _common_tokens(requests: Requests) -> Ints:
    """Return [n]: the number of tokens with which each prompt begins like the prompt before it."""
    lengths = np.diff(requests.offsets)
    compared = np.zeros(len(lengths), np.int64)
    compared[1:] = np.minimum(lengths[1:], lengths[:-1])
    row = np.repeat(np.arange(len(lengths)), compared)
    within = indices_within(compared)
    tokens, starts = requests.token_ids, requests.offsets[:-1]
    differ = tokens[starts[row] + within] != tokens[starts[row - 1] + within]
    same = compared.copy()
    np.minimum.at(same, row[differ], within[differ])
    return same
