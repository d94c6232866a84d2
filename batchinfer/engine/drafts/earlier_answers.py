"""`EarlierAnswers`: what the newest rows of a job answered, to be looked up.

Letters in shapes: n sequences, L lengths of n-grams, W tokens of the longest.
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
FIRST_TOKENS = 1 << 14  # that there is an index for at first: memory that nothing was written to yet is slow
GROWTH = 4
END_OF_ROW = -1


class EarlierAnswers:
    """Answers end to end in a ring, each with END_OF_ROW behind it, so that no n-gram is of two rows."""

    def __init__(self, shortest: int, longest: int) -> None:
        self.text = np.full(KEPT_TOKENS, END_OF_ROW, np.int32)
        self.index = NgramIndex(shortest, longest, FIRST_TOKENS)
        self.written = 0  # tokens and ends of rows, since the job began
        self.indexed = 0

    def write(self, token_ids: Tokens, offsets: Ints) -> None:
        """Add rows; what is oldest is overwritten."""
        added = np.insert(token_ids, offsets[1:], END_OF_ROW)[-KEPT_TOKENS:]
        self.text[(self.written + np.arange(len(added))) % KEPT_TOKENS] = added
        self.written += len(added)

    def find(self, newest: Tokens, hashes: Hashes) -> tuple[Ints, Ints]:
        """(ends [n], lengths [n]): where n-grams of these newest tokens [n, W] stood, with their hashes [n, L]."""
        self._index_new()
        ends = self.index.find(hashes)
        return longest_match(ends, agreement(self.text, ends, newest), self.index.lengths)

    def copy(self, ends: Ints, count: int) -> Tokens:
        """The tokens behind these ends: [n, count]."""
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
            ends = ends[self.text.take(ends, mode="wrap") != END_OF_ROW]  # where something follows
            self.index.put(self.index.hashes(read_ngrams(self.text, ends, self.index.longest)), ends)
        self.indexed = self.written
