"""`PrefixTree`: shares the common start of neighbouring prompts, in whole tiles, so that it is computed once.

The tiles of all prompts form a tree, and rows come in its depth-first order. So only the path to the newest row is
held, and each tile on it only as long as the next row shares it: no tile is evicted that is needed again, and none kept
that is not. The last tile of a prompt is never shared, because its row must compute it to sample the first new token.
Rows with the very same prompt are twins: the prompt is computed for one of them, and the others get copies of its last
blocks.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.request import Requests
from batchinfer.kernels.grain import TILE
from batchinfer.kernels.ragged import Ints, indices_within


@dataclass(frozen=True)
class TileScores:
    """Log-probabilities that m positions of a tile predict, the last m: those of the tokens that follow them."""

    values: NDArray[np.float32]  # [m]; the last one is that of the maker's own token
    top_ids: NDArray[np.int32]  # [m, k]
    top_values: NDArray[np.float32]  # [m, k]
    behind: dict[int, np.float32]  # the last position's, by token: the continuations


@dataclass(eq=False)
class SharedTile:
    """The blocks of some positions, the grain, that several sequences begin with, at the same positions."""

    blocks: Ints
    users: int = 0  # sequences that read it
    wanted: bool = True  # the next row to be admitted shares it
    computed: bool = False  # computed, or part of the step that is being scheduled
    spoiled: bool = False  # may hold values that are not finite
    snapshot: int = 0  # the state behind it that later rows begin from; 0 if there is none
    readers: int = 0  # those rows, as long as their prompts are not computed
    maker: int = -1  # epoch of the sequence that computes it for all
    continuations: tuple[int, ...] = ()  # tokens behind it, of rows that share no more and want their log-probabilities
    scores: "TileScores | None" = None  # log-probabilities that its maker has found


class PrefixTree:
    """Holds the shared tiles on the path to the row that was admitted last."""

    def __init__(self, manager: BlockManager, blocks_per_tile: int, states: BlockManager | None = None) -> None:
        """Take the managers of blocks, and of states if the model has them."""
        self._manager, self._states = manager, states
        self._blocks_per_tile = blocks_per_tile
        self._path: list[SharedTile] = []

    def enter(self, shared: int, shared_by_next: int, branches: dict[int, int] | None = None) -> list[SharedTile]:
        """Return the shared tiles of the next row.

        The first `shared` are those of the row before; the first `shared_by_next` are held for the row after. After
        these numbers of new tiles `branches` has that many rows begin, from a snapshot. The blocks of new tiles, and
        the states of snapshots, must have been promised.
        """
        new = range(shared, shared_by_next)
        tiles = self._path[:shared] + [SharedTile(self._manager.take(self._blocks_per_tile)) for _ in new]
        assert len(tiles) == max(shared, shared_by_next), "rows came in another order than they were compared in"
        for depth, readers in (branches or {}).items():
            assert self._states is not None
            tiles[depth - 1].snapshot, tiles[depth - 1].readers = int(self._states.take(1)[0]), readers
        for tile in tiles:
            tile.users += 1
        for tile in tiles[shared_by_next:]:
            tile.wanted = False
        self._path = tiles[:shared_by_next]
        return tiles

    def let_go(self, tile: SharedTile) -> None:
        """Free the tile's snapshot with the last row that begins from it."""
        tile.readers -= 1
        if not tile.readers:
            self._free_snapshot(tile)

    def _free_snapshot(self, tile: SharedTile) -> None:
        assert self._states is not None
        self._states.release(np.array([tile.snapshot]), 1)
        tile.snapshot = 0

    def drop(self) -> Ints:
        """Forget the path, because no next row will come; return the blocks that this frees and that must be wiped."""
        for tile in self._path:
            tile.wanted = False
            tile.users += 1
            if tile.snapshot:
                self._free_snapshot(tile)
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

    @cached_property
    def branches(self) -> dict[int, dict[int, int]]:
        """Count the rows that branch from each row's own tiles, those it is the first to have: {row: {tiles: rows}}."""
        found: dict[int, dict[int, int]] = {}
        path: list[int] = []  # rows with ever more tiles; a row's tiles are new in the last row that has fewer
        for row, depth in enumerate(self.tiles.tolist()):
            while path and self.tiles[path[-1]] >= depth:
                path.pop()
            if depth:
                first = found.setdefault(path[-1], {})
                first[depth] = first.get(depth, 0) + 1
            path.append(row)
        return found

    @classmethod
    def none(cls, rows: int) -> "Likeness":
        """Return the likeness of `rows` rows that share nothing."""
        return cls(np.zeros(rows, np.int64), np.zeros(rows, np.bool_))


def likeness(requests: Requests, grain: int = TILE) -> Likeness:
    """Compare the tokens of neighbouring requests and return what they have in common, in tiles of `grain` tokens."""
    lengths = np.diff(requests.offsets)
    same = _common_tokens(requests)
    before = np.concatenate([lengths[:1], lengths[:-1]])
    tiles = np.minimum(same, np.minimum(lengths, before) - 1) // grain
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
