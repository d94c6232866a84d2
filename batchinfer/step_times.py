"""`StepTimes`: what a step of so many tokens takes, learned from the steps that ran."""

import numpy as np
from numpy.typing import NDArray

WEIGHT = 0.2  # of the newest step in a mean
GROWING = 0.5
"""The share of a step's time that grows with its tokens, beyond the sizes that were seen: rather too low than too high,
so that larger steps are tried, and known from then on."""


class StepTimes:
    """Seconds by size; a straight line between sizes that were seen."""

    def __init__(self) -> None:
        self._sizes = np.empty(0, np.int64)  # in order
        self._seconds = np.empty(0)
        self._seen = np.empty(0, np.int64)

    def observe(self, size: int, seconds: float) -> None:
        """A step of that size took so long."""
        i = int(np.searchsorted(self._sizes, size))
        if i == len(self._sizes) or self._sizes[i] != size:
            self._sizes = np.insert(self._sizes, i, size)
            self._seconds, self._seen = np.insert(self._seconds, i, seconds), np.insert(self._seen, i, 1)
            return
        # The first step of a size makes its kernels.
        before = min(self._seconds[i], seconds) if self._seen[i] == 1 else self._seconds[i]
        self._seconds[i] = before + WEIGHT * (seconds - before)
        self._seen[i] += 1

    def of(self, sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Expected seconds [n] of steps of these sizes [n]; 0 before any was seen."""
        if not len(self._sizes):
            return np.zeros(len(sizes))
        low, high = self._sizes[0], self._sizes[-1]
        inside: NDArray[np.float64] = np.interp(sizes, self._sizes, self._seconds)
        nearest = np.clip(sizes, low, high)
        return inside * (1 + GROWING * (sizes - nearest) / nearest)
