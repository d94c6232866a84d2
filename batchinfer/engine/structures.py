"""`Structures`: the grammars that running sequences follow, and where each sequence is in its grammar.

A matcher reads the tokens that a sequence has behind its prompt, and so tells which may come next. It is made when the
sequence is first asked about, also after a preemption, so that nothing but the sequence's tokens is ever kept of it.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from torch import Tensor

from batchinfer.engine.new_tokens import NewTokens
from batchinfer.engine.request import Requests, RowError
from batchinfer.engine.sequence import SequenceTable
from batchinfer.kernels.ragged import Ints
from batchinfer.text.grammars import Grammar, compiled, error_of, matcher, token_bytes
from batchinfer.text.tokenizer import Tokenizer

MOST_KEPT = 256  # grammars, of about 100 KB each

_Job = tuple[int, LLMatcher, int, list[int]]
"""A sequence's place, its matcher, the first of its rows of logits, and its drafts, which have the rows behind that."""


@dataclass
class _Follower:
    epoch: int  # of the sequence, since places are reused
    matcher: LLMatcher
    read: int = 0  # tokens of the answer


class Structures:
    """Follows the sequences of a table whose params have a grammar."""

    def __init__(self, table: SequenceTable, tokenizer: Tokenizer, vocabulary: int, forces: bool) -> None:
        """Make followers for `table`. With `forces`, a token is taken without the model if no other is allowed."""
        self._table, self._tokenizer, self._vocabulary, self._forces = table, tokenizer, vocabulary, forces
        self._tokens: LLTokenizer | None = None  # made for the first row that needs it, because that takes a second
        self._threads: LLExecutor | None = None
        self._starts: OrderedDict[Grammar, LLMatcher] = OrderedDict()  # those used last come last
        self._followers: dict[int, _Follower] = {}  # by place
        self._errors: dict[int, str] = {}  # by place, of sequences that cannot go on
        self.forced = 0  # tokens taken without asking the model

    def prepare(self, requests: Requests) -> None:
        """Get ready for the grammars of requests. Raises `ValueError` if the tokenizer does not fit any."""
        if self._tokens is None and any(params.structure is not None for params in requests.params.others):
            self._tokens = token_bytes(self._tokenizer, self._vocabulary)
            self._threads = LLExecutor(torch.get_num_threads())

    def error(self, place: int) -> RowError | None:
        """Return why the sequence at `place` cannot go on; None if it can."""
        if not self._table.structured[place] or (error := self._errors.get(place)) is None:
            return None
        return RowError("bad_grammar", f"the grammar {error}")

    def failed(self, places: Ints) -> list[int]:
        """Return those of `places` whose sequences cannot go on."""
        if not self._errors:
            return []
        return [place for place in places.tolist() if place in self._errors and self._table.structured[place]]

    def within(self, places: Ints, drafts: Ints) -> Ints:
        """Return the numbers of drafts [n] of the sequences at `places` [n], each cut where its grammar forbids one."""
        table, allowed = self._table, drafts.copy()
        for i in np.flatnonzero((drafts > 0) & table.structured[places]).tolist():
            place, length = int(places[i]), int(table.length[places[i]])
            drafted = table.tokens[place, length : length + int(drafts[i])].tolist()
            allowed[i] = self._matcher(place).validate_tokens(drafted)
        return allowed

    def allowed(self, sequences: Ints) -> Callable[[], Tensor] | None:
        """Return what finds the tokens that may follow each of r rows of logits; see `Batch.allowed`.

        `sequences` [r] are the rows' places; a sequence with drafts has as many further rows, and its drafts must be in
        the table. None if no sequence has a grammar.
        """
        table = self._table
        if not table.structured[sequences].any():
            return None
        first = np.flatnonzero(np.diff(sequences, prepend=-1))
        jobs: list[_Job] = []
        for row, count in zip(first.tolist(), np.diff(first, append=len(sequences)).tolist(), strict=True):
            place = int(sequences[row])
            if table.structured[place]:
                length = int(table.length[place])
                drafts = table.tokens[place, length : length + count - 1].tolist()
                jobs.append((place, self._matcher(place), row, drafts))
        return partial(self._fill, jobs, len(sequences))

    def _fill(self, jobs: list[_Job], rows: int) -> Tensor:
        words = -(-self._vocabulary // 32)
        bits = torch.full((rows, words), -1, dtype=torch.int32)
        assert self._threads is not None
        into = bits.data_ptr(), 4 * words, rows
        if plain := [(found, row) for _, found, row, drafts in jobs if not drafts]:
            self._threads.unsafe_compute_mask_ptr(plain, *into)
        if drafted := [(found, row, drafts) for _, found, row, drafts in jobs if drafts]:
            self._threads.unsafe_compute_mask_ptr_with_draft_token(drafted, *into)
        for place, found, _, _ in jobs:
            self._note_error(place, found)
        return bits

    def extend(self, new: NewTokens) -> NewTokens:
        """Append to sequences that got new tokens those that their grammars force behind them; count these as new."""
        following = np.flatnonzero(self._table.structured[new.places] & new.finite)
        if not len(following):
            return new
        counts = new.counts.copy()
        for i in following.tolist():
            counts[i] += self._append_forced(int(new.places[i]))
        return replace(new, counts=counts)

    def _append_forced(self, place: int) -> int:
        table, ends = self._table, self._tokenizer.eos_ids
        if not self._forces or table.bans[place] or table.tokens[place, table.length[place] - 1] in ends:
            return 0
        before = int(table.length[place])
        self._append(place, self._matcher(place).compute_ff_tokens())
        stopped = self._matcher(place).is_stopped()
        if place in self._errors:
            return 0
        if stopped and len(ends) == 1:  # of several ends, the model chooses
            self._append(place, list(ends))
        new = int(table.length[place]) - before
        self.forced += new
        return new

    def _append(self, place: int, tokens: list[int]) -> None:
        table = self._table
        length = int(table.length[place])
        fitting = tokens[: max(0, int(table.end[place]) - length)]
        table.tokens[place, length : length + len(fitting)] = fitting
        table.length[place] += len(fitting)

    def _matcher(self, place: int) -> LLMatcher:
        """Return the matcher of the sequence at `place`, which has read all its tokens."""
        table = self._table
        follower = self._followers.get(place)
        if follower is None or follower.epoch != table.epoch[place]:
            self._errors.pop(place, None)
            follower = self._followers[place] = _Follower(int(table.epoch[place]), self._start(place))
        answer = table.generated(place)
        if len(answer) > follower.read:
            follower.matcher.consume_tokens(answer[follower.read :].tolist())
            follower.read = len(answer)
        self._note_error(place, follower.matcher)
        return follower.matcher

    def _note_error(self, place: int, found: LLMatcher) -> None:
        if error := error_of(found):
            self._errors[place] = error

    def _start(self, place: int) -> LLMatcher:
        """Return a new matcher at the start of a sequence's grammar."""
        grammar = self._table.params[place].structure
        assert grammar is not None and self._tokens is not None
        if grammar not in self._starts:
            self._starts[grammar] = matcher(self._tokens, compiled(grammar))
        self._starts.move_to_end(grammar)
        if len(self._starts) > MOST_KEPT:
            self._starts.popitem(last=False)
        return self._starts[grammar].deep_copy()
