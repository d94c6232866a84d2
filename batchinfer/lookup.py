"""`LookupDrafter`: drafts read from text that is there, by finding where the newest tokens stood before.

An answer often repeats pieces of its prompt, of itself, or of the answers before it (prompt lookup, Saxena 2023).
Letters in shapes: n places, L lengths of n-grams, W tokens of the longest, K drafts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.ngram_index import Ints, NgramIndex, Tokens, windows
from batchinfer.sequence import SequenceTable
from batchinfer.speculation import Speculation

LIBRARY_TOKENS = 1 << 20
INDEXED_AT_ONCE = 1 << 16  # n-grams' ends, for the sake of memory
END_OF_ROW = -1  # in the library, behind each row
NO_TOKEN = -2  # before a text; differs from all that is there


@dataclass(frozen=True)
class Proposals:
    """Drafts of n places: row i of `tokens` has `counts[i]` of them, and what is behind these means nothing."""

    counts: Ints  # [n]
    tokens: Tokens  # [n, K], K the most that any place may have
    matched: Ints  # [n], tokens that agreed before what was copied; 0 where nothing was found
    from_library: NDArray[np.bool_]  # [n], copied from an earlier row's answer


class LookupDrafter:
    """Copies what followed the longest n-gram that ends at a sequence's newest token and stood earlier.

    It looks in the sequence's own text, and but for method `ngram` in the answers of earlier rows, which are taken
    where they agree with more tokens. Of several places the latest counts. Text is indexed when a draft is asked for
    that could come from it.
    """

    def __init__(self, table: SequenceTable, speculation: Speculation) -> None:
        shortest, longest = speculation.prompt_lookup_min, speculation.prompt_lookup_max
        self.table = table
        self.most = speculation.num_speculative_tokens
        self.index = NgramIndex(shortest, longest, table.tokens.size)
        self.rows = np.full(len(table.row), -1, np.int64)  # whose n-grams are in the index ...
        self.indexed = np.zeros(len(table.row), np.int64)  # ... and how far
        self.library = None if speculation.method == "ngram" else Library(shortest, longest)

    def draft(self, places: Ints, most: Ints) -> Proposals:
        """Drafts for sequences at these places, int64 [n], each at most so many, int64 [n]."""
        table, index = self.table, self.index
        text, lengths, starts = table.tokens.reshape(-1), table.length[places], places * table.max_tokens
        self._index_older(places, lengths)
        newest = windows(text, starts + lengths, index.longest)
        newest[np.arange(index.longest) >= lengths[:, None]] = NO_TOKEN  # there are no more
        hashes = index.hashes(newest)
        ends = index.find(index.salted(hashes, places))
        agreeing = agreement(text, starts[:, None] + ends, newest)
        # What is found before the text's start, or from its newest token on, was left by a row that had its place.
        agreeing = np.minimum(agreeing, ends) * (ends < lengths[:, None])
        ends, matched = longest_match(ends, agreeing, index.lengths)

        counts = np.minimum(most, self.most)
        o_k = np.arange(counts.max(initial=0))
        # A copy that reaches the newest token goes on with what it has copied: a repetition goes on.
        tokens = text[(starts + ends)[:, None] + o_k % (lengths - ends)[:, None]]
        from_library = np.zeros(len(places), np.bool_)
        if self.library is not None and self.library.written:
            found, longer = self.library.find(newest, hashes)
            from_library = longer > matched
            matched = np.maximum(matched, longer)
            copies = self.library.copy(found[from_library], len(o_k))
            tokens[from_library] = copies
            counts[from_library] = np.minimum(counts[from_library], (copies != END_OF_ROW).cumprod(1).sum(1))
        counts[matched == 0] = 0
        return Proposals(counts, tokens, matched, from_library)

    def remember(self, token_ids: Tokens, offsets: Ints) -> None:
        """Put answers of rows that ended into the library: the i-th is `token_ids[offsets[i]:offsets[i + 1]]`."""
        if self.library is not None:
            self.library.write(token_ids, offsets)

    def _index_older(self, places: Ints, lengths: Ints) -> None:
        """Index what is new since the last time, but for what ends at the newest token and would find itself."""
        rows, indexed = self.table.row[places], self.indexed[places]
        # Another row took the place, or the same one came back and had to begin again.
        indexed[(self.rows[places] != rows) | (indexed >= lengths)] = 0
        self.rows[places], self.indexed[places] = rows, lengths - 1
        new = lengths - 1 - indexed
        ends = np.arange(new.sum()) + np.repeat(indexed + 1 - new.cumsum() + new, new)
        owners = np.repeat(places, new)
        for first in range(0, len(ends), INDEXED_AT_ONCE):
            part = slice(first, first + INDEXED_AT_ONCE)
            self._index(owners[part], ends[part])

    def _index(self, places: Ints, ends: Ints) -> None:
        text, starts = self.table.tokens.reshape(-1), places * self.table.max_tokens
        hashes = self.index.hashes(windows(text, starts + ends, self.index.longest))
        self.index.put(self.index.salted(hashes, places), ends)


class Library:
    """The newest answers of a job, end to end in a ring, each with END_OF_ROW behind it: no n-gram is of two rows."""

    def __init__(self, shortest: int, longest: int) -> None:
        self.text = np.full(LIBRARY_TOKENS, END_OF_ROW, np.int32)
        self.index = NgramIndex(shortest, longest, LIBRARY_TOKENS)
        self.written = 0  # tokens and ends of rows, since the job began
        self.indexed = 0

    def write(self, token_ids: Tokens, offsets: Ints) -> None:
        """Add rows; what is oldest is overwritten."""
        added = np.insert(token_ids, offsets[1:], END_OF_ROW)[-LIBRARY_TOKENS:]
        self.text[(self.written + np.arange(len(added))) % LIBRARY_TOKENS] = added
        self.written += len(added)

    def find(self, newest: Tokens, hashes: NDArray[np.uint64]) -> tuple[Ints, Ints]:
        """(ends [n], lengths [n]): where n-grams of these newest tokens [n, W] stood, with their hashes [n, L]."""
        self._index_new()
        ends = self.index.find(hashes)
        return longest_match(ends, agreement(self.text, ends, newest), self.index.lengths)

    def copy(self, ends: Ints, count: int) -> Tokens:
        """The tokens behind these ends: [n, count]."""
        return self.text.take(ends[:, None] + np.arange(count), mode="wrap")

    def _index_new(self) -> None:
        first = max(self.indexed, self.written - LIBRARY_TOKENS)
        for start in range(first, self.written, INDEXED_AT_ONCE):
            ends = np.arange(start, min(start + INDEXED_AT_ONCE, self.written)) % LIBRARY_TOKENS + 1
            ends = ends[self.text.take(ends, mode="wrap") != END_OF_ROW]  # where something follows
            self.index.put(self.index.hashes(windows(self.text, ends, self.index.longest)), ends)
        self.indexed = self.written


def agreement(text: Tokens, ends: Ints, newest: Tokens) -> Ints:
    """How many tokens before these ends [n, L] of a text are the newest ones [n, W]: [n, L]."""
    there = windows(text, ends, newest.shape[1])
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
