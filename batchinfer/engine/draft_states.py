"""`DraftStates`: lends states to the tokens of sequences with drafts, so that what was not accepted leaves no trace."""

import numpy as np

from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.new_tokens import NewTokens
from batchinfer.engine.sequence import SequenceTable
from batchinfer.kernels.ragged import Ints, offsets_of
from batchinfer.models.batch import Queries


class DraftStates:
    """The states that the step under way has borrowed from those that are free."""

    def __init__(self, table: SequenceTable, states: BlockManager) -> None:
        self._table, self._states = table, states
        self._lent = np.empty(0, np.int64)

    @property
    def most_drafts(self) -> int:
        """Most drafts that states are left for: one for each token of their sequences, at most two for each draft."""
        return self._states.unpromised // 2

    def lend(self, places: Ints, counts: Ints, drafts: Ints) -> Ints:
        """Return the state that each token leaves: its sequence's own, or a lent one if the sequence has drafts.

        The sequences at `places` [n] compute `counts` [n] tokens, the last `drafts` [n] of which are drafts.
        """
        drafted = np.repeat(drafts > 0, counts)
        promised = self._states.promise(int(drafted.sum()))
        assert promised, "more drafts than states are free for"
        self._lent = self._states.take(int(drafted.sum()))
        left = np.repeat(self._table.state[places], counts)
        left[drafted] = self._lent
        return left

    def keep(self, queries: Queries, new: NewTokens) -> None:
        """Let each sequence with drafts own the state behind its last accepted token; take the others back.

        One without a new token keeps the state from before the step.
        """
        table = self._table
        assert queries.left is not None
        accepted = np.zeros(len(table.active), np.int64)
        accepted[new.places] = new.counts
        free, offsets = [np.empty(0, np.int64)], offsets_of(queries.counts)
        for i in np.flatnonzero(queries.drafts).tolist():
            place = int(queries.places[i])
            states = np.append(table.state[place], queries.left[offsets[i] : offsets[i + 1]])
            table.state[place] = states[accepted[place]]
            free.append(np.delete(states, accepted[place]))
        self._take_back(np.concatenate(free))

    def drop(self) -> None:
        """Take back all that is lent; each sequence keeps the state from before the step."""
        self._take_back(self._lent)

    def _take_back(self, states: Ints) -> None:
        self._states.release(states, len(self._lent))
        self._lent = np.empty(0, np.int64)
