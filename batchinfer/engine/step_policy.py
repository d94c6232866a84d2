"""The rules that fill a step. The scheduler follows them, and so does the simulation that predicts a job's steps.

Free of torch: the parent process of a job imports this module.
"""

import numpy as np
from numpy.typing import NDArray

from batchinfer.kernels.grain import TILE
from batchinfer.kernels.ragged import Ints


def chunk_end(start: int, stop: int, room: int) -> int:
    """Return the end of the chunk that begins at `start`: the prompt's end `stop`, or before it on the grid of tiles.

    The step has room for `room` more tokens. The result is at most `start` if no chunk fits.
    """
    end = min(stop, start + room)
    return end if end == stop else end // TILE * TILE


def tiles_of(start: int, end: int) -> range:
    """Return the indices, in the sequence, of the tiles that hold the prompt tokens [start, end)."""
    return range(start // TILE, (end - 1) // TILE + 1)


def decoding(computed: Ints, prefill_end: Ints, end: Ints) -> NDArray[np.bool_]:
    """Return [n]: which sequences have a token to decode.

    Their prompt is computed, and they are not at their end: a sequence's last token is sampled but never computed.
    """
    found: NDArray[np.bool_] = (computed >= prefill_end) & (computed + 1 < end)
    return found
