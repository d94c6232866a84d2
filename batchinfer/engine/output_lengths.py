"""`OutputLengths`: how many new tokens a row will take, learned from those before it."""

import numpy as np

from batchinfer.kernels.ragged import Ints

BIN = 16  # tokens
LEAST_ENDED = 32
"""So many rows must have ended before anything is concluded from them."""
MOST_TEMPLATES = 256
"""Rows of one template are neighbours: of those that came long ago none is left."""


class OutputLengths:
    """Quantiles of the new tokens of rows, by template: a number for all rows that begin alike, or -1.

    The rows that end first are the short ones. So those still running count too, as far as they have come: at each
    length, the share that ended there of those that reached it (Kaplan and Meier 1958).
    """

    def __init__(self, max_tokens: int) -> None:
        self._bins = max_tokens // BIN + 2
        self._ended: dict[int, Ints] = {}  # by template, [bins] rows that ended with so many tokens
        self._all = np.zeros(self._bins, np.int64)
        self.quantile = 0.9

    def observe(self, template: int, tokens: int) -> None:
        """A row has ended."""
        self._all[tokens // BIN] += 1
        if template >= 0:
            self._ended.setdefault(template, np.zeros(self._bins, np.int64))[tokens // BIN] += 1
            if len(self._ended) > MOST_TEMPLATES:
                self._ended.pop(next(iter(self._ended)))

    def known(self, template: int) -> int:
        """The template, or -1 where too few of its rows have ended."""
        ended = self._ended.get(template)
        return -1 if ended is None or ended.sum() < LEAST_ENDED else template

    def grow(self) -> None:
        """What was expected was too little."""
        self.quantile = 1 - (1 - self.quantile) / 2

    def expected(self, template: int, generated: int, most: int, running: Ints) -> int:
        """New tokens of a row that has `generated` of them and may get `most`: not more, at the present quantile.

        `template` is a known one; `running` are the new tokens so far of its rows under way, or of all for -1. Where
        too little is known it is `most`.
        """
        ended = self._ended.get(template, self._all)
        if ended.sum() < LEAST_ENDED:
            return most
        here = np.minimum(running // BIN, self._bins - 1)
        reached = np.cumsum((ended + np.bincount(here, minlength=self._bins))[::-1])[::-1]
        stays = 1 - ended / np.maximum(reached, 1)
        first = (generated + 1) // BIN
        left = np.cumprod(stays[first:])  # of rows that came so far, the share that goes beyond each bin
        beyond = np.flatnonzero(left <= 1 - self.quantile)
        return min(most, (first + int(beyond[0]) + 1) * BIN) if len(beyond) else most
