"""`SharedPrefixes`: chooses which sequences of a step read their first keys together, on a GPU.

Neighbours in a step that begin with the same shared tiles form a tree: a template, and below it groups of rows that go
on alike. A sequence reads only one prefix together with others, so of nested prefixes those are chosen that save the
most: one for a whole group of sequences, or those of the smaller groups in it.
"""

import numpy as np

from batchinfer.engine.sequence import SequenceTable
from batchinfer.kernels.attention_plan import Tiling, tile_tokens
from batchinfer.kernels.grain import TILE
from batchinfer.kernels.ragged import Ints
from batchinfer.kernels.ragged_attention import SharedPrefix

KEYS_A_PARTIAL = 2
"""A partial result of one token and query head takes as many bytes to write and read as this many keys with their
values in 16 bits. A token that reads its keys in two parts, a prefix and its own, has two partial results."""


class SharedPrefixes:
    """Finds the shared prefixes of each step of one sequence table; steps of the same sequences are looked at once."""

    def __init__(self, group: int, tiling: Tiling, fixed: bool) -> None:
        """Take the number of query heads that share a key head, and the tiles of attention.

        With `fixed` bits, prefixes end on the grid on which keys are split; a token then has the same partial results
        without a prefix, and a prefix costs nothing.
        """
        self._tiles = group, tiling, fixed
        self._cost = 0 if fixed else 2 * KEYS_A_PARTIAL * group  # of a token with a prefix, in keys
        self._grain = tiling.split if fixed else TILE  # keys, where prefixes end
        self._sequences = np.empty((3, 0), np.int64)
        self._prefixes: tuple[SharedPrefix, ...] = ()

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
        wide, tokens = tile_tokens(lengths, *self._tiles)
        keys = tiles * TILE // self._grain * self._grain
        keys[1:][wide[1:] != wide[:-1]] = 0  # a long chunk, which fills tiles by itself, does not join few tokens
        alone = -(-lengths // tokens)
        first, prefix, gain = np.zeros((3, len(keys)), np.int64)  # the gain stands at a group's first sequence
        for level in np.unique(keys)[:0:-1]:  # not 0, which the first sequence has; from small groups to large ones
            begin = np.flatnonzero(keys < level)
            count = np.diff(begin, append=len(keys))
            together = np.add.reduceat(lengths, begin)
            saved = np.add.reduceat(alone, begin) - -(-together // tile_tokens(together, *self._tiles)[1])
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
