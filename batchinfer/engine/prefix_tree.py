"""`PrefixTree`: what the prompts of neighbouring rows have in common is computed once, in whole tiles.

Rows come in depth-first order of the tree of their prompts' tiles: so only the path to the newest row is held, a tile
of it for as long as the next row shares it. Nothing is evicted that is needed again, and nothing kept that is not.
The last tile of a prompt is never shared, for its row computes it to see what follows; rows with the very same prompt
are twins, which see that together, and get copies of it.
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
    """`TILE` positions that several sequences begin with, at the same place."""

    blocks: Ints
    users: int = 0  # sequences that read it
    wanted: bool = True  # by the next row of the plan
    computed: bool = False  # or in the step that is being put together
    spoiled: bool = False  # perhaps, by values that are not finite


class PrefixTree:
    """The path to the row that was admitted last."""

    def __init__(self, manager: BlockManager, block_size: int) -> None:
        self._manager = manager
        self._blocks_per_tile = TILE // block_size
        self._path: list[SharedTile] = []

    def enter(self, shared: int, shared_by_next: int) -> list[SharedTile]:
        """The tiles of the next row: `shared` of them are those of the row before, and as many as the row after it
        shares will be wanted again. The blocks of new ones have been promised."""
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
        """Forget what the next row may share, for none will come; returns the blocks that are free now and must be
        wiped."""
        for tile in self._path:
            tile.wanted = False
            tile.users += 1
        path, self._path = self._path, []
        return self.leave(path)

    def leave(self, tiles: list[SharedTile]) -> Ints:
        """A sequence that had these tiles ends; the blocks that are free by that and must be wiped."""
        wiped = [np.empty(0, np.int64)]
        for tile in tiles:
            tile.users -= 1
            if not tile.users and not tile.wanted:
                self._manager.release(tile.blocks, len(tile.blocks))
                wiped += [tile.blocks] if tile.spoiled else []
        return np.concatenate(wiped)


@dataclass(frozen=True)
class Likeness:
    """What n rows have in common, each with the one before it."""

    tiles: Ints  # [n] of their prompts
    twins: NDArray[np.bool_]  # [n] their whole prompts

    @classmethod
    def none(cls, rows: int) -> "Likeness":
        """As if each row were the first."""
        return cls(np.zeros(rows, np.int64), np.zeros(rows, np.bool_))


def likeness(requests: Requests) -> Likeness:
    """Of neighbouring requests, found by comparing tokens."""
    lengths = np.diff(requests.offsets)
    same = _common_tokens(requests)
    before = np.concatenate([lengths[:1], lengths[:-1]])
    tiles = np.minimum(same, np.minimum(lengths, before) - 1) // TILE
    return Likeness(tiles, (same == lengths) & (lengths == before))


def _common_tokens(requests: Requests) -> Ints:
    """[n] that the prompt of each request begins with as does the one before it."""
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
