"""`Acceptance`: the probability that drafts are accepted, learned from the drafts that were verified."""

import numpy as np
from numpy.typing import NDArray

from batchinfer.kernels.ragged import Ints

PRIOR = np.array([0.6, 0.8])  # of the first draft and of each later one before any was verified: high enough to try
PRIOR_TOKENS = 4  # weight, in verified drafts, of the prior, and of all kinds together beside one kind
KEPT = 0.998  # share of all counts that is kept at each step, so that drafts that were not accepted are tried again
HISTORIES = 4  # kinds of history: nothing drafted yet; of the sequence's last drafts none, some or all accepted


class Acceptance:
    """Counts accepted drafts by kind of evidence and by history: whether the sequence's last drafts were accepted.

    History matters because text that repeats itself goes on repeating itself. First drafts are counted apart from later
    ones, because later drafts are mostly accepted where the first one is. A kind with few verified drafts is assumed to
    be like the other kinds: where none of those is accepted, it gets few tries.
    """

    def __init__(self, kinds: int, capacity: int) -> None:
        """Make empty counts for `kinds` kinds of evidence and up to `capacity` sequences."""
        self._accepted = np.zeros((kinds, HISTORIES, 2))  # last axis: first drafts, later drafts
        self._tried = np.zeros((kinds, HISTORIES, 2))
        self._history = np.zeros(capacity, np.int64)
        self._epochs = np.full(capacity, -1, np.int64)

    def of(self, places: Ints, epochs: Ints, kinds: Ints, depth: int) -> NDArray[np.float64]:
        """Return [n, depth]: the probability that draft j of sequence i and all drafts before it are accepted.

        `epochs` [n] tell which sequence has each of `places` [n] now: a new one begins without history. `kinds` [n] are
        the kinds of evidence for their drafts.
        """
        self._history[places] = np.where(self._epochs[places] == epochs, self._history[places], 0)
        self._epochs[places] = epochs
        at = kinds, self._history[places]
        of_all = (self._accepted.sum(0) + PRIOR * PRIOR_TOKENS) / (self._tried.sum(0) + PRIOR_TOKENS)  # [histories, 2]
        expected = of_all[self._history[places]]
        likely = (self._accepted[at] + expected * PRIOR_TOKENS) / (self._tried[at] + PRIOR_TOKENS)
        found: NDArray[np.float64] = likely[:, :1] * likely[:, 1:] ** np.arange(depth)
        return found

    def observe(self, places: Ints, kinds: Ints, drafts: Ints, accepted: Ints) -> None:
        """Count that the first `accepted` [n] of `drafts` [n] drafts of each sequence were accepted."""
        at = kinds, self._history[places]
        first = np.minimum(accepted, 1)
        np.add.at(self._accepted, at, np.stack([first, accepted - first], 1))
        np.add.at(self._tried, at, np.stack([np.ones_like(accepted), np.minimum(accepted, drafts - 1)], 1))
        self._history[places] = np.where(accepted == 0, 1, np.where(accepted < drafts, 2, 3))

    def fade(self) -> None:
        """Weaken all counts by one step, so that newer drafts count more."""
        self._accepted *= KEPT
        self._tried *= KEPT
