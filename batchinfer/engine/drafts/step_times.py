"""`StepTimes`: what a step of so many tokens takes, learned from the steps that ran."""

import numpy as np
from numpy.typing import NDArray

WEIGHT = 0.2  # of the newest step in the means
KEPT = 0.95  # of what a token more was seen to cost, from step to step: a slow one must not end all drafting
GROWING = 0.5  # the share of a step's time that grows with its tokens, as long as nothing tells
LINE = 2.0  # steps that the line counts for, beside those of a size itself

Floats = NDArray[np.float64]


class StepTimes:
    """Seconds by size: a straight line through the newest steps, and how far off it steps of a size are.

    What a token costs is seen from one step to the next. Over many, sequences grow and machines slow down, and the
    steps of the last few rows would seem to take longer for being small.
    """

    def __init__(self) -> None:
        self._off: dict[int, tuple[float, int]] = {}  # size -> seconds beside the line, how many steps were seen
        self._mean = self._last = np.zeros(2)  # (size, seconds) of the newest steps, and of the last
        self._sums = np.zeros(2)  # of size ** 2 and size * seconds, differences from step to step
        self.prompt_token = 0.0  # seconds of a token in steps of prompts; 0 before any was seen

    def observe(self, size: int, seconds: float) -> None:
        """A step of that size took so long."""
        step = np.array([size, seconds])
        if not self._off:
            self._mean = self._last = step
        off = seconds - float(self._on_line(np.array([size]))[0])
        mean, seen = self._off.get(size, (off, 0))
        mean = min(mean, off) if seen == 1 else mean
        self._off[size] = mean + WEIGHT * (off - mean), seen + 1
        if seen:  # the first step of a size makes its kernels
            more = step - self._last
            self._sums = KEPT * self._sums + more[0] * more
            self._mean = self._mean + WEIGHT * (step - self._mean)
            self._last = step

    def observe_prompts(self, tokens: int, seconds: float) -> None:
        """A step of prompts took so long. Before steps of several sizes were seen, a token more is taken to cost what
        it costs there."""
        each = seconds / tokens
        before = self.prompt_token or each
        self.prompt_token = min(each, before + WEIGHT * (each - before))

    def of(self, sizes: NDArray[np.int64]) -> Floats:
        """Expected seconds [n] of steps of these sizes [n]; 0 before any was seen."""
        if not self._off:
            return np.zeros(len(sizes))
        off, seen = np.array([self._off.get(size, (0.0, 0)) for size in sizes.tolist()]).T
        weight = np.minimum(seen, 1 / WEIGHT)
        expected: Floats = np.maximum(self._on_line(sizes) + weight / (weight + LINE) * off, 0.0)
        return expected

    def _on_line(self, sizes: NDArray[np.int64]) -> Floats:
        size, seconds = self._mean
        on_line: Floats = np.maximum(seconds + self._slope() * (sizes - size), 0.0)
        return on_line

    def _slope(self) -> float:
        """Seconds of a token more: the least-squares slope of the differences from step to step, drawn towards what a
        token costs in steps of prompts (ridge regression). That prior weighs as much as one difference of half the mean
        size, so that a few observations of larger differences outweigh it."""
        size, seconds = self._mean
        squares, products = self._sums
        prior = min(self.prompt_token, seconds / size) or GROWING * seconds / size
        weight = (size / 2) ** 2
        return max((products + weight * prior) / (squares + weight), 0.0)
