"""`EarlierAnswers`: the answers of the rows that a job finished last, indexed by their n-grams.

Letters in shapes: n sequences, L lengths of n-grams, W tokens of the longest n-gram.
"""

import numpy as np

from batchinfer.engine.drafts.ngram_index import (
    INDEXED_AT_ONCE,
    Hashes,
    NgramIndex,
    Tokens,
    agreement,
    longest_match,
    read_ngrams,
)
from batchinfer.kernels.ragged import Ints

KEPT_TOKENS = 1 << 20
FIRST_TOKENS = 1 << 14  # size of the first index; a large one would touch much new memory, which is slow
GROWTH = 4
END_OF_ROW = -1


class EarlierAnswers:
    """Holds answers end to end in a ring buffer, each followed by END_OF_ROW, so that no n-gram spans two rows."""

    def __init__(self, shortest: int, longest: int) -> None:
        self.text = np.full(KEPT_TOKENS, END_OF_ROW, np.int32)
        self.index = NgramIndex(shortest, longest, FIRST_TOKENS)
        self.written = 0  # tokens and END_OF_ROW marks since the job began, overwritten ones included
        self.indexed = 0

    def write(self, token_ids: Tokens, offsets: Ints) -> None:
        """Add answers, the i-th being `token_ids[offsets[i]:offsets[i + 1]]`; they overwrite the oldest ones."""
        added = np.insert(token_ids, offsets[1:], END_OF_ROW)[-KEPT_TOKENS:]
        self.text[(self.written + np.arange(len(added))) % KEPT_TOKENS] = added
        self.written += len(added)

    def find(self, newest: Tokens, hashes: Hashes) -> tuple[Ints, Ints]:
        """Return (ends [n], lengths [n]): where the longest n-gram of each sequence's newest tokens ended in an answer.

        `newest` [n, W] are those tokens, newest first, and `hashes` [n, L] those of their n-grams. A length is 0 where
        none was found.
        """
        self._index_new()
        ends = self.index.find(hashes)
        return longest_match(ends, agreement(self.text, ends, newest), self.index.lengths)

    def copy(self, ends: Ints, count: int) -> Tokens:
        """Return the `count` tokens that follow each of `ends` [n]: [n, count]."""
        return self.text.take(ends[:, None] + np.arange(count), mode="wrap")

    def _index_new(self) -> None:
        size = self.index.size
        while size < min(self.written, KEPT_TOKENS):
            size *= GROWTH
        if size > self.index.size:
            self.index, self.indexed = NgramIndex(self.index.shortest, self.index.longest, size), 0
        first = max(self.indexed, self.written - KEPT_TOKENS)
        for start in range(first, self.written, INDEXED_AT_ONCE):
            ends = np.arange(start, min(start + INDEXED_AT_ONCE, self.written)) % KEPT_TOKENS + 1
            ends = ends[self.text.take(ends, mode="wrap") != END_OF_ROW]  # ends that a token follows
            self.index.put(self.index.hashes(read_ngrams(self.text, ends, self.index.longest)), ends)
        self.indexed = self.written
