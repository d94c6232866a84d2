"""Rows of any lengths, laid end to end in one array: row i is `values[offsets[i]:offsets[i + 1]]`. Free of torch."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Number = TypeVar("Number", bound=np.generic)


def offsets_of(lengths: Ints) -> Ints:
    """Offsets [n + 1] of rows of these lengths [n]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ranges(starts: Ints, lengths: Ints) -> tuple[Ints, Ints]:
    """Count up from each start, as far as its length: (the numbers of all rows end to end, offsets [n + 1])."""
    offsets = offsets_of(lengths)
    return np.arange(int(offsets[-1])) + np.repeat(starts - offsets[:-1], lengths), offsets


def indices_within(lengths: Ints) -> Ints:
    """Index of each value within its row, for rows of these lengths [n]."""
    return ranges(np.zeros_like(lengths), lengths)[0]


def take_ragged(values: NDArray[Number], offsets: Ints, index: Ints) -> tuple[NDArray[Number], Ints]:
    """Pick rows by index: (values, offsets) of `[values[offsets[i]:offsets[i + 1]] for i in index]`."""
    places, out = ranges(offsets[:-1][index], np.diff(offsets)[index])
    return values[places], out
