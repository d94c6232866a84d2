"""`OutputLengths`: predicts how many new tokens a row will take, from the rows before it."""

import numpy as np

from batchinfer.kernels.ragged import Ints

BIN = 16  # tokens of a bin of the histograms
LEAST_ENDED = 32
"""Rows that must have ended before their lengths are used."""
MOST_TEMPLATES = 256
"""Templates whose lengths are kept. Rows of one template are neighbours, so old templates have no rows left."""


class OutputLengths:
    """Learns quantiles of the number of new tokens of rows, by template.

    A template is a number that rows whose prompts begin alike have in common, or -1. Rows that end first are the short
    ones, so that rows still running must count too. At each length the estimate takes the share of rows that ended
    there, among all rows that reached it (Kaplan and Meier 1958).
    """

    def __init__(self, max_tokens: int) -> None:
        self._bins = max_tokens // BIN + 2
        self._ended: dict[int, Ints] = {}  # by template: [bins] number of rows that ended in each bin
        self._all = np.zeros(self._bins, np.int64)
        self.quantile = 0.9

    def observe(self, template: int, tokens: int) -> None:
        """Count a row of `template` that ended with `tokens` new tokens."""
        self._all[tokens // BIN] += 1
        if template >= 0:
            self._ended.setdefault(template, np.zeros(self._bins, np.int64))[tokens // BIN] += 1
            if len(self._ended) > MOST_TEMPLATES:
                self._ended.pop(next(iter(self._ended)))

    def known(self, template: int) -> int:
        """Return `template`, or -1 if too few of its rows have ended."""
        ended = self._ended.get(template)
        return -1 if ended is None or ended.sum() < LEAST_ENDED else template

    def grow(self) -> None:
        """Raise the quantile, after rows took more tokens than expected."""
        self.quantile = 1 - (1 - self.quantile) / 2

    def expected(self, template: int, generated: int, most: int, running: Ints) -> int:
        """Return the number of new tokens that a row is expected not to exceed, at the present quantile.

        The row has `generated` new tokens so far and may get `most`. `template` comes from `known`. `running` [r] holds
        the new tokens so far of the template's running rows, or of all running rows for -1. The result is `most` if too
        few rows have ended.
        """
        ended = self._ended.get(template, self._all)
        if ended.sum() < LEAST_ENDED:
            return most
        here = np.minimum(running // BIN, self._bins - 1)
        reached = np.cumsum((ended + np.bincount(here, minlength=self._bins))[::-1])[::-1]
        stays = 1 - ended / np.maximum(reached, 1)
        first = (generated + 1) // BIN
        left = np.cumprod(stays[first:])  # share that goes beyond each bin, of rows that came this far
        beyond = np.flatnonzero(left <= 1 - self.quantile)
        return min(most, (first + int(beyond[0]) + 1) * BIN) if len(beyond) else most
