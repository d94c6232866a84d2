"""`SharedPrefixes`: chooses which sequences of a step read their first keys together, where a kernel can.

Neighbours in a step that begin with the same shared tiles form a tree: a template, and below it groups of rows that go
on alike. A sequence reads only one prefix together with others, so of nested prefixes those are chosen that save the
most: one for a whole group of sequences, or those of the smaller groups in it.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.sequence import SequenceTable
from batchinfer.kernels.attention_cpu import tokens_of_item
from batchinfer.kernels.attention_plan import Tiling, tile_tokens
from batchinfer.kernels.grain import TILE
from batchinfer.kernels.ragged import Ints
from batchinfer.kernels.ragged_attention import SharedPrefix

KEYS_A_PARTIAL = 2
"""A partial result of one token and query head takes as many bytes to write and read as this many keys with their
values in 16 bits. A token that reads its keys in two parts, a prefix and its own, has two partial results."""

TileTokens = Callable[[Ints], tuple[NDArray[np.bool_], Ints]]
"""Returns, for runs of tokens of these lengths, whether each takes the wider tile, and how many tokens fit in it."""


class SharedPrefixes:
    """Finds the shared prefixes of each step of one sequence table; steps of the same sequences are looked at once."""

    def __init__(self, tile_tokens: TileTokens, cost: int, grain: int) -> None:
        """Take how tokens are put into tiles, the cost of a token with a prefix, and the grid of keys on which prefixes
        end. The cost is counted in keys that are read."""
        self._tile_tokens, self._cost, self._grain = tile_tokens, cost, grain
        self._sequences = np.empty((3, 0), np.int64)
        self._prefixes: tuple[SharedPrefix, ...] = ()

    @classmethod
    def on_gpu(cls, group: int, tiling: Tiling, fixed: bool) -> "SharedPrefixes":
        """Take the number of query heads that share a key head, and the tiles of attention.

        With `fixed` bits, prefixes end on the grid on which keys are split; a token then has the same partial results
        without a prefix, and a prefix costs nothing.
        """
        cost = 0 if fixed else 2 * KEYS_A_PARTIAL * group
        tiles = partial(tile_tokens, group=group, tiling=tiling, fixed=fixed)
        return cls(tiles, cost, tiling.split if fixed else TILE)

    @classmethod
    def on_cpu(cls, group: int, head_dim: int) -> "SharedPrefixes":
        """Take the number of query heads that share a key head, and the size of a head, for the kernel in C.

        What a prefix leaves of a token and query head is in 32 bits, and is written once and read once.
        """
        tokens = tokens_of_item(group, head_dim)

        def tiles(lengths: Ints) -> tuple[NDArray[np.bool_], Ints]:
            return np.zeros(len(lengths), np.bool_), np.full_like(lengths, tokens)

        return cls(tiles, 2 * KEYS_A_PARTIAL * group, TILE)

    def of(self, table: SequenceTable, places: Ints, lengths: Ints, contexts: Ints) -> tuple[SharedPrefix, ...]:
        """Return the prefixes that a step's sequences read together.

        They are at `places` [S], in the step's order, and have `lengths` [S] new tokens, with which they reach
        `contexts` [S] positions.
        """
        # A prompt chunk may begin within the tiles that its sequence shares.
        shared = np.minimum(table.own_from[places] * table.block_size, contexts - lengths) // TILE
        sequences = np.stack([table.epoch[places], lengths, shared])
        if not np.array_equal(sequences, self._sequences):
            self._sequences = sequences
            self._prefixes = self._choose(_tiles_in_common(table, places, shared), lengths) if shared.any() else ()
        return self._prefixes

    def _choose(self, tiles: Ints, lengths: Ints) -> tuple[SharedPrefix, ...]:
        """Choose prefixes for S sequences.

        `tiles` [S] is the number of tiles that a sequence has in common with the one before it. What is gained is
        counted in keys that are not read; a tile of queries reads its keys once.
        """
        wide, tokens = self._tile_tokens(lengths)
        keys = tiles * TILE // self._grain * self._grain
        keys[1:][wide[1:] != wide[:-1]] = 0  # a long chunk, which fills tiles by itself, does not join few tokens
        alone = -(-lengths // tokens)
        first, prefix, gain = np.zeros((3, len(keys)), np.int64)  # the gain stands at a group's first sequence
        for level in np.unique(keys)[:0:-1]:  # not 0, which the first sequence has; from small groups to large ones
            begin = np.flatnonzero(keys < level)
            count = np.diff(begin, append=len(keys))
            together = np.add.reduceat(lengths, begin)
            saved = np.add.reduceat(alone, begin) - -(-together // self._tile_tokens(together)[1])
            gained = level * saved - self._cost * together
            better = gained > np.add.reduceat(gain, begin)
            joined = np.repeat(better, count)
            first[joined], prefix[joined], gain[joined] = np.repeat(begin, count)[joined], level, 0
            gain[begin[better]] = gained[better]
        begin, count = np.unique(first[prefix > 0], return_counts=True)
        columns = (begin.tolist(), count.tolist(), prefix[begin].tolist())
        return tuple(SharedPrefix(*one) for one in zip(*columns, strict=True))


def _tiles_in_common(table: SequenceTable, places: Ints, shared: Ints) -> Ints:
    """Return [S]: how many tiles a sequence has in common with the one before it, of the first `shared` [S] of each."""
    per_tile = TILE // table.block_size
    first_blocks = table.blocks[places, : int(shared.max()) * per_tile : per_tile]
    within = np.arange(first_blocks.shape[1]) < np.minimum(shared[1:], shared[:-1])[:, None]
    # Paths through a tree: sequences that have a tile in common have all tiles before it in common.
    same = (first_blocks[1:] == first_blocks[:-1]) & within
    return np.concatenate([[0], np.count_nonzero(same, 1)])
