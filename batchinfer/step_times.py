"""`StepTimes`: what a step of so many tokens takes, learned from the steps that ran."""

import numpy as np
from numpy.typing import NDArray

WEIGHT = 0.2  # of the newest step in the mean of its size
KEPT = 0.98  # of the line, from step to step
GROWING = 0.5  # the share of a step's time that grows with its tokens, as long as nothing tells
LINE = 2.0  # steps that the line counts for, beside those of a size itself


class StepTimes:
    """Seconds by size: of what was seen of a size itself, and of the straight line through all steps."""

    def __init__(self) -> None:
        self._means: dict[int, tuple[float, int]] = {}  # size -> seconds, how many were seen
        self._sums = np.zeros(5)  # of 1, size, seconds, size ** 2, size * seconds; the newest weigh most
        self.prompt_token = 0.0  # seconds of a token in steps of prompts; 0 before any was seen

    def observe(self, size: int, seconds: float) -> None:
        """A step of that size took so long."""
        mean, seen = self._means.get(size, (seconds, 0))
        mean = min(mean, seconds) if seen == 1 else mean
        mean += WEIGHT * (seconds - mean)
        first = not self._means
        self._means[size] = mean, seen + 1
        if seen or first:  # the first step of a size makes its kernels
            self._sums = KEPT * self._sums + np.array([1, size, mean, size * size, size * mean])

    def observe_prompts(self, tokens: int, seconds: float) -> None:
        """A step of prompts took so long. Before steps of several sizes were seen, a token more is taken to cost what
        it costs there."""
        each = seconds / tokens
        before = self.prompt_token or each
        self.prompt_token = min(each, before + WEIGHT * (each - before))

    def of(self, sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Expected seconds [n] of steps of these sizes [n]; 0 before any was seen."""
        if not self._means:
            return np.zeros(len(sizes))
        intercept, slope = self._line()
        expected: NDArray[np.float64] = np.maximum(intercept + slope * sizes, 0.0)
        for i, size in enumerate(sizes.tolist()):
            if size in self._means:
                mean, seen = self._means[size]
                weight = min(seen, 1 / WEIGHT)
                expected[i] = (weight * mean + LINE * expected[i]) / (weight + LINE)
        return expected

    def _line(self) -> tuple[float, float]:
        """(intercept, slope): least squares, with a step of half the mean size more that has the slope of prompts."""
        count, sizes, seconds, squares, products = self._sums.tolist()
        size, mean = sizes / count, seconds / count
        spread = (size / 2) ** 2 / count
        expected = min(self.prompt_token, mean / size) or GROWING * mean / size
        slope = (products / count - size * mean + spread * expected) / (squares / count - size**2 + spread)
        slope = max(slope, 0.0)
        return mean - slope * size, slope
