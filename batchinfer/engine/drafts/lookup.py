"""`LookupDrafter`: drafts read from text that is there, by finding where the newest tokens stood before.

An answer often repeats pieces of its prompt, of itself, or of the answers before it (prompt lookup, Saxena 2023).
Letters in shapes: n places, L lengths of n-grams, W tokens of the longest, K drafts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.config import Speculation
from batchinfer.engine.drafts.earlier_answers import END_OF_ROW, EarlierAnswers
from batchinfer.engine.drafts.ngram_index import (
    INDEXED_AT_ONCE,
    NgramIndex,
    Tokens,
    agreement,
    longest_match,
    read_ngrams,
)
from batchinfer.engine.sequence import SequenceTable
from batchinfer.kernels.ragged import Ints, ranges

NO_TOKEN = -2  # before a text; differs from all that is there


@dataclass(frozen=True)
class Proposals:
    """Drafts of n places: row i of `tokens` has `counts[i]` of them, and what is behind these means nothing."""

    counts: Ints  # [n]
    tokens: Tokens  # [n, K], K the most that any place may have
    matched: Ints  # [n], tokens that agreed before what was copied; 0 where nothing was found
    from_earlier_answer: NDArray[np.bool_]  # [n], copied from an earlier row's answer


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
        self.earlier_answers = None if speculation.method == "ngram" else EarlierAnswers(shortest, longest)

    def draft(self, places: Ints, most: Ints) -> Proposals:
        """Drafts for sequences at these places, int64 [n], each at most so many, int64 [n]."""
        table, index = self.table, self.index
        text, lengths, starts = table.tokens.reshape(-1), table.length[places], places * table.max_tokens
        self._index_older(places, lengths)
        newest = read_ngrams(text, starts + lengths, index.longest)
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
        from_earlier_answer = np.zeros(len(places), np.bool_)
        if self.earlier_answers is not None and self.earlier_answers.written:
            found, longer = self.earlier_answers.find(newest, hashes)
            from_earlier_answer = longer > matched
            matched = np.maximum(matched, longer)
            copies = self.earlier_answers.copy(found[from_earlier_answer], len(o_k))
            tokens[from_earlier_answer] = copies
            counts[from_earlier_answer] = np.minimum(
                counts[from_earlier_answer], (copies != END_OF_ROW).cumprod(1).sum(1)
            )
        counts[matched == 0] = 0
        return Proposals(counts, tokens, matched, from_earlier_answer)

    def remember(self, token_ids: Tokens, offsets: Ints) -> None:
        """Put answers of rows that ended into the library: the i-th is `token_ids[offsets[i]:offsets[i + 1]]`."""
        if self.earlier_answers is not None:
            self.earlier_answers.write(token_ids, offsets)

    def _index_older(self, places: Ints, lengths: Ints) -> None:
        """Index what is new since the last time, but for what ends at the newest token and would find itself."""
        rows, indexed = self.table.row[places], self.indexed[places]
        # Another row took the place, or the same one came back and had to begin again.
        indexed[(self.rows[places] != rows) | (indexed >= lengths)] = 0
        self.rows[places], self.indexed[places] = rows, lengths - 1
        new = lengths - 1 - indexed
        ends, _ = ranges(indexed + 1, new)
        owners = np.repeat(places, new)
        for first in range(0, len(ends), INDEXED_AT_ONCE):
            part = slice(first, first + INDEXED_AT_ONCE)
            self._index(owners[part], ends[part])

    def _index(self, places: Ints, ends: Ints) -> None:
        text, starts = self.table.tokens.reshape(-1), places * self.table.max_tokens
        hashes = self.index.hashes(read_ngrams(text, starts + ends, self.index.longest))
        self.index.put(self.index.salted(hashes, places), ends)
