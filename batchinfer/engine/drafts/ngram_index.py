"""`NgramIndex`: where an n-gram of a text ended last, as a hash table in a flat array.

Letters in shapes: m places in texts, n sequences, L lengths of n-grams, W tokens of the longest.
"""

import numpy as np
from numpy.typing import NDArray

from batchinfer.kernels.ragged import Ints

Tokens = NDArray[np.int32]
Hashes = NDArray[np.uint64]

MOST_SLOT_BITS = 24  # 64 MiB, taken as they are written; of more n-grams than that some are not found again
INDEXED_AT_ONCE = 1 << 16  # places in a text, for the sake of memory


class NgramIndex:
    """The last ends of n-grams of `shortest` to `longest` tokens, in a text of about `size` tokens.

    An entry may be of another n-gram, and of a text that is no longer there: who reads the text at the end that was
    found has to compare. So nothing is ever taken out.
    """

    def __init__(self, shortest: int, longest: int, size: int) -> None:
        self.shortest, self.longest, self.size = shortest, longest, size
        self.lengths = np.arange(longest, shortest - 1, -1)  # [L]
        bits = min(MOST_SLOT_BITS, (2 * size * (longest - shortest + 1)).bit_length())
        self._ends = np.zeros(1 << bits, np.int32)
        self._shift = np.uint64(64 - bits)
        # Sums weighted at random are a universal hash, in its high bits.
        weights = np.random.default_rng(0).integers(1 << 64, size=longest + 1, dtype=np.uint64) | np.uint64(1)
        self._weights, self._text_weight = weights[:-1], weights[-1]

    def hashes(self, ngrams: Tokens) -> Hashes:
        """Of the n-grams that windows [m, W] of tokens, the newest first, begin with: [m, L], the longest first."""
        # Tokens count with their id + 1: a token of id 0 in front is another n-gram than none.
        sums = ((ngrams + 1).astype(np.uint64) * self._weights).cumsum(1)
        of_lengths: Hashes = sums[:, self.lengths - 1]
        return of_lengths

    def salted(self, hashes: Hashes, texts: Ints) -> Hashes:
        """The same [m, L] for n-grams that are kept apart by the number of their text, [m]."""
        of_texts: Hashes = hashes + (texts.view(np.uint64) * self._text_weight)[:, None]
        return of_texts

    def find(self, hashes: Hashes) -> Ints:
        """Where n-grams [m, L] ended last; 0 where none has."""
        return self._ends[self._slots(hashes)].astype(np.int64)

    def put(self, hashes: Hashes, ends: Ints) -> None:
        """N-grams [m, L] end here, [m]; of equal ones the last counts."""
        slots = self._slots(hashes)
        self._ends.put(slots, ends.repeat(slots.shape[1]))  # one after the other, which an assignment does not promise

    def _slots(self, hashes: Hashes) -> Ints:
        slots: Ints = (hashes >> self._shift).view(np.int64)
        return slots


def read_ngrams(text: Tokens, ends: Ints, length: int) -> Tokens:
    """The `length` tokens before each end [...], the newest first: [..., length]. Before the text comes its end."""
    return text.take(ends[..., None] - np.arange(1, length + 1), mode="wrap")


def agreement(text: Tokens, ends: Ints, newest: Tokens) -> Ints:
    """How many tokens before these ends [n, L] of a text are the newest ones [n, W]: [n, L]."""
    there = read_ngrams(text, ends, newest.shape[1])
    differs = np.ones((*ends.shape, newest.shape[1] + 1), np.bool_)
    np.not_equal(there, newest[:, None], out=differs[..., :-1])
    agreeing: Ints = differs.argmax(-1)
    return agreeing


def longest_match(ends: Ints, agreeing: Ints, lengths: Ints) -> tuple[Ints, Ints]:
    """(ends [n], their lengths [n]) of the first n-gram in each row of [n, L] that agrees; 0 and 0 where none does."""
    agrees = agreeing >= lengths
    best = agrees.argmax(1)
    chosen = best + np.arange(len(ends)) * len(lengths)
    found = agrees.reshape(-1)[chosen]
    return ends.reshape(-1)[chosen] * found, lengths[best] * found
