"""`Acceptance`: how likely a draft is right, learned from those that were verified."""

import numpy as np
from numpy.typing import NDArray

from batchinfer.batch import Ints

PRIOR = 0.6  # before anything is known: high enough for a try
PRIOR_TOKENS = 4  # what that is worth
KEPT = 0.998  # of what was learned, from step to step: what did not pay is tried again some day
HISTORIES = 4  # of a sequence: nothing drafted yet; of its last drafts none were right; some; all


class Acceptance:
    """By kind of evidence, and by what became of the sequence's last drafts: text that repeats itself goes on so."""

    def __init__(self, kinds: int, capacity: int) -> None:
        """`kinds` of evidence, for up to `capacity` sequences."""
        self._right = np.zeros((kinds, HISTORIES))
        self._tried = np.zeros((kinds, HISTORIES))
        self._history = np.zeros(capacity, np.int64)
        self._epochs = np.full(capacity, -1, np.int64)

    def of(self, places: Ints, epochs: Ints, kinds: Ints) -> NDArray[np.float64]:
        """The probability [n] of each sequence's next draft to be right, if those before it are."""
        self._history[places] = np.where(self._epochs[places] == epochs, self._history[places], 0)
        self._epochs[places] = epochs
        at = kinds, self._history[places]
        found: NDArray[np.float64] = (self._right[at] + PRIOR * PRIOR_TOKENS) / (self._tried[at] + PRIOR_TOKENS)
        return found

    def observe(self, places: Ints, kinds: Ints, drafts: Ints, right: Ints) -> None:
        """Of `drafts` [n] of these sequences the first `right` [n] were so."""
        at = kinds, self._history[places]
        np.add.at(self._right, at, right)
        np.add.at(self._tried, at, np.minimum(right + 1, drafts))
        self._history[places] = np.where(right == 0, 1, np.where(right < drafts, 2, 3))

    def fade(self) -> None:
        """A step has passed."""
        self._right *= KEPT
        self._tried *= KEPT
