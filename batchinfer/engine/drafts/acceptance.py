"""`Acceptance`: how likely drafts are accepted, learned from those that were verified."""

import numpy as np
from numpy.typing import NDArray

from batchinfer.kernels.ragged import Ints

PRIOR = np.array([0.6, 0.8])  # before anything is known: high enough for a try
PRIOR_TOKENS = 4  # what that is worth, and what all kinds together are beside one of them
KEPT = 0.998  # of what was learned, from step to step: what did not pay is tried again some day
HISTORIES = 4  # of a sequence: nothing drafted yet; of its last drafts none were accepted; some; all


class Acceptance:
    """By kind of evidence, and by what became of the sequence's last drafts: text that repeats itself goes on so.

    The first draft and those behind it apart, for where the first is accepted, it mostly goes on. A kind of which little
    was seen is taken to be like the others: where none of them is accepted, it is not worth many tries.
    """

    def __init__(self, kinds: int, capacity: int) -> None:
        """`kinds` of evidence, for up to `capacity` sequences."""
        self._accepted = np.zeros((kinds, HISTORIES, 2))  # of first drafts; of later ones
        self._tried = np.zeros((kinds, HISTORIES, 2))
        self._history = np.zeros(capacity, np.int64)
        self._epochs = np.full(capacity, -1, np.int64)

    def of(self, places: Ints, epochs: Ints, kinds: Ints, depth: int) -> NDArray[np.float64]:
        """The probabilities [n, depth] that so many of each sequence's next drafts are accepted, and all before them."""
        self._history[places] = np.where(self._epochs[places] == epochs, self._history[places], 0)
        self._epochs[places] = epochs
        at = kinds, self._history[places]
        of_all = (self._accepted.sum(0) + PRIOR * PRIOR_TOKENS) / (self._tried.sum(0) + PRIOR_TOKENS)  # [histories, 2]
        expected = of_all[self._history[places]]
        likely = (self._accepted[at] + expected * PRIOR_TOKENS) / (self._tried[at] + PRIOR_TOKENS)
        found: NDArray[np.float64] = likely[:, :1] * likely[:, 1:] ** np.arange(depth)
        return found

    def observe(self, places: Ints, kinds: Ints, drafts: Ints, accepted: Ints) -> None:
        """Of `drafts` [n] of these sequences the first `accepted` [n] were so."""
        at = kinds, self._history[places]
        first = np.minimum(accepted, 1)
        np.add.at(self._accepted, at, np.stack([first, accepted - first], 1))
        np.add.at(self._tried, at, np.stack([np.ones_like(accepted), np.minimum(accepted, drafts - 1)], 1))
        self._history[places] = np.where(accepted == 0, 1, np.where(accepted < drafts, 2, 3))

    def fade(self) -> None:
        """A step has passed."""
        self._accepted *= KEPT
        self._tried *= KEPT
