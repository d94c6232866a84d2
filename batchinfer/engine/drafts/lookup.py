"""`LookupDrafter`: copies drafts from known text, after finding where the newest tokens occurred before.

An answer often repeats parts of its prompt, of itself, or of earlier answers (prompt lookup, Saxena 2023).
Letters in shapes: n sequences, L lengths of n-grams, W tokens of the longest n-gram, K drafts.
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

NO_TOKEN = -2  # stands before the start of a text; differs from every token id


@dataclass(frozen=True)
class Proposals:
    """Drafts of n sequences: the first `counts[i]` tokens of row i of `tokens`; the rest of the row is arbitrary."""

    counts: Ints  # [n]
    tokens: Tokens  # [n, K], K the largest number of drafts that a sequence may have
    matched: Ints  # [n], length of the n-gram that was found; 0 where none was
    from_earlier_answer: NDArray[np.bool_]  # [n], copied from an earlier row's answer


class LookupDrafter:
    """Finds the longest n-gram that ends at a sequence's newest token and occurred earlier; drafts what followed it.

    It searches the sequence's own text and, unless the method is `ngram`, the answers of earlier rows. An earlier
    answer is used only if its n-gram is longer. Of several occurrences the latest counts. Text is indexed only when a
    draft is asked for that could come from it.
    """

    def __init__(self, table: SequenceTable, speculation: Speculation) -> None:
        shortest, longest = speculation.prompt_lookup_min, speculation.prompt_lookup_max
        self.table = table
        self.most = speculation.num_speculative_tokens
        self.index = NgramIndex(shortest, longest, table.tokens.size)
        self.rows = np.full(len(table.row), -1, np.int64)  # by place: the row whose n-grams are in the index
        self.indexed = np.zeros(len(table.row), np.int64)  # by place: how many of its tokens are indexed
        self.earlier_answers = None if speculation.method == "ngram" else EarlierAnswers(shortest, longest)

    def draft(self, places: Ints, most: Ints) -> Proposals:
        """Return drafts for the sequences in `places` [n], at most `most` [n] for each."""
        table, index = self.table, self.index
        text, lengths, starts = table.tokens.reshape(-1), table.length[places], places * table.max_tokens
        self._index_older(places, lengths)
        newest = read_ngrams(text, starts + lengths, index.longest)
        newest[np.arange(index.longest) >= lengths[:, None]] = NO_TOKEN  # positions before the start of the text
        hashes = index.hashes(newest)
        ends = index.find(index.salted(hashes, places))
        agreeing = agreement(text, starts[:, None] + ends, newest)
        # An end outside the text, or at its newest token or later, was left by another row that had this place before.
        agreeing = np.minimum(agreeing, ends) * (ends < lengths[:, None])
        ends, matched = longest_match(ends, agreeing, index.lengths)

        counts = np.minimum(most, self.most)
        o_k = np.arange(counts.max(initial=0))
        # A copy that reaches the newest token starts again from the copied tokens: repetitions continue.
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
        """Keep the answers of rows that ended for later rows: the i-th is `token_ids[offsets[i]:offsets[i + 1]]`."""
        if self.earlier_answers is not None:
            self.earlier_answers.write(token_ids, offsets)

    def _index_older(self, places: Ints, lengths: Ints) -> None:
        """Index the n-grams that are new since the last call, except those that end at the newest token.

        Those would only find themselves.
        """
        rows, indexed = self.table.row[places], self.indexed[places]
        # Start again if another row took the place, or if the same row was preempted and begins again.
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
