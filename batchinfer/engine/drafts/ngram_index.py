"""`NgramIndex`: a hash table in a flat array that says where an n-gram of a text ended last.

Letters in shapes: m positions in texts, n sequences, L lengths of n-grams, W tokens of the longest n-gram.
"""

import numpy as np
from numpy.typing import NDArray

from batchinfer.kernels.ragged import Ints

Tokens = NDArray[np.int32]
Hashes = NDArray[np.uint64]

MOST_SLOT_BITS = 24  # 64 MiB, allocated as slots are written; with more n-grams some overwrite others
INDEXED_AT_ONCE = 1 << 16  # positions of a text; more at once would take more memory


class NgramIndex:
    """Holds the last end of each n-gram of `shortest` to `longest` tokens, in a text of about `size` tokens.

    An entry may belong to another n-gram with the same slot, or to text that was overwritten since. So the caller must
    compare the text at the end that was found, and no entry is ever deleted.
    """

    def __init__(self, shortest: int, longest: int, size: int) -> None:
        self.shortest, self.longest, self.size = shortest, longest, size
        self.lengths = np.arange(longest, shortest - 1, -1)  # [L]
        bits = min(MOST_SLOT_BITS, (2 * size * (longest - shortest + 1)).bit_length())
        self._ends = np.zeros(1 << bits, np.int32)
        self._shift = np.uint64(64 - bits)
        # The high bits of a sum with random weights are a universal hash.
        weights = np.random.default_rng(0).integers(1 << 64, size=longest + 1, dtype=np.uint64) | np.uint64(1)
        self._weights, self._text_weight = weights[:-1], weights[-1]

    def hashes(self, ngrams: Tokens) -> Hashes:
        """Return the hashes [m, L], longest n-gram first, of the n-grams that each row of `ngrams` [m, W] begins with.

        A row holds tokens, the newest first.
        """
        # Adding 1 makes an n-gram that begins with id 0 differ from the same n-gram without that token.
        sums = ((ngrams + 1).astype(np.uint64) * self._weights).cumsum(1)
        of_lengths: Hashes = sums[:, self.lengths - 1]
        return of_lengths

    def salted(self, hashes: Hashes, texts: Ints) -> Hashes:
        """Return `hashes` [m, L] mixed with the number of their text, `texts` [m]; this keeps texts apart."""
        of_texts: Hashes = hashes + (texts.view(np.uint64) * self._text_weight)[:, None]
        return of_texts

    def find(self, hashes: Hashes) -> Ints:
        """Return where the n-grams with these hashes [m, L] ended last, [m, L]; 0 where none did."""
        return self._ends[self._slots(hashes)].astype(np.int64)

    def put(self, hashes: Hashes, ends: Ints) -> None:
        """Record that the n-grams with these hashes [m, L] end at `ends` [m]; of equal ones the last counts."""
        slots = self._slots(hashes)
        self._ends.put(slots, ends.repeat(slots.shape[1]))  # in order, which an indexed assignment does not promise

    def _slots(self, hashes: Hashes) -> Ints:
        slots: Ints = (hashes >> self._shift).view(np.int64)
        return slots


def read_ngrams(text: Tokens, ends: Ints, length: int) -> Tokens:
    """Return the `length` tokens before each of `ends` [...], newest first: [..., length].

    The text is read as a ring: its end comes before its start.
    """
    return text.take(ends[..., None] - np.arange(1, length + 1), mode="wrap")


def agreement(text: Tokens, ends: Ints, newest: Tokens) -> Ints:
    """Return how many tokens before each of `ends` [n, L] equal the `newest` tokens [n, W], counted back: [n, L]."""
    there = read_ngrams(text, ends, newest.shape[1])
    differs = np.ones((*ends.shape, newest.shape[1] + 1), np.bool_)
    np.not_equal(there, newest[:, None], out=differs[..., :-1])
    agreeing: Ints = differs.argmax(-1)
    return agreeing


def longest_match(ends: Ints, agreeing: Ints, lengths: Ints) -> tuple[Ints, Ints]:
    """Return (ends [n], lengths [n]) of the longest n-gram of each sequence that agrees in full; 0 and 0 if none does.

    `ends` and `agreeing` are [n, L], and `lengths` [L], longest first.
    """
    agrees = agreeing >= lengths
    best = agrees.argmax(1)
    chosen = best + np.arange(len(ends)) * len(lengths)
    found = agrees.reshape(-1)[chosen]
    return ends.reshape(-1)[chosen] * found, lengths[best] * found
