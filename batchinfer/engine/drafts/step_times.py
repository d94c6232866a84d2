"""`StepTimes`: the seconds that a step of N tokens takes, learned from the steps that ran."""

import numpy as np
from numpy.typing import NDArray

WEIGHT = 0.2  # of the newest step in running means
KEPT = 0.95  # share of the slope's sums that is kept at each step, so that one slow step cannot end all drafting
GROWING = 0.5  # assumed share of a step's time that grows with its tokens, until steps tell
LINE = 2.0  # weight of the fitted line, in observed steps, beside the observed steps of a size

Floats = NDArray[np.float64]


class StepTimes:
    """Predicts seconds by step size: a straight line through recent steps, plus each size's own offset from it.

    The line's slope, the seconds per token, is fitted to differences between consecutive steps. Fitted to all steps it
    would be biased: sequences grow and machines slow down during a job, so that the small steps of the last few rows
    would seem slow because they are small.
    """

    def __init__(self) -> None:
        self._off: dict[int, tuple[float, int]] = {}  # size -> (mean seconds above the line, number of steps seen)
        self._mean = self._last = np.zeros(2)  # (size, seconds): running mean, and the last step
        self._sums = np.zeros(2)  # sums of d_size ** 2 and d_size * d_seconds over differences between steps
        self.prompt_token = 0.0  # seconds per token in prompt steps; 0 before any was seen

    def observe(self, size: int, seconds: float) -> None:
        """Learn that a step of `size` tokens took `seconds`."""
        step = np.array([size, seconds])
        if not self._off:
            self._mean = self._last = step
        off = seconds - float(self._on_line(np.array([size]))[0])
        mean, seen = self._off.get(size, (off, 0))
        mean = min(mean, off) if seen == 1 else mean
        self._off[size] = mean + WEIGHT * (off - mean), seen + 1
        if seen:  # the first step of a size is left out, because it also compiles kernels
            more = step - self._last
            self._sums = KEPT * self._sums + more[0] * more
            self._mean = self._mean + WEIGHT * (step - self._mean)
            self._last = step

    def observe_prompts(self, tokens: int, seconds: float) -> None:
        """Learn that a step of `tokens` prompt tokens took `seconds`.

        The seconds per prompt token serve as the slope until steps of several sizes were seen.
        """
        each = seconds / tokens
        before = self.prompt_token or each
        self.prompt_token = min(each, before + WEIGHT * (each - before))

    def of(self, sizes: NDArray[np.int64]) -> Floats:
        """Return the expected seconds [n] of steps of `sizes` [n] tokens; 0 before any step was seen."""
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
        """Return the seconds per additional token, by ridge regression.

        This is the least-squares slope of differences between consecutive steps, drawn towards the seconds per prompt
        token. That prior weighs as much as one difference of half the mean size, so that a few observed differences
        that are larger outweigh it.
        """
        size, seconds = self._mean
        squares, products = self._sums
        prior = min(self.prompt_token, seconds / size) or GROWING * seconds / size
        weight = (size / 2) ** 2
        return max((products + weight * prior) / (squares + weight), 0.0)
