"""What goes into a step: the rules by which the scheduler fills it, and by which a job's steps are counted beforehand.

Free of torch: the parent process of a job counts by them.
"""

import numpy as np
from numpy.typing import NDArray

from batchinfer.kernels.grain import MIN_ROWS, TILE
from batchinfer.kernels.ragged import Ints


def chunk_end(start: int, stop: int, room: int) -> int:
    """Where a chunk of a prompt ends, of which the tokens from `start` to `stop` are left and `room` have a place in
    the step: at the prompt's end, or on the grid of tiles before it. Not above `start` where no chunk fits."""
    end = min(stop, start + room)
    return end if end == stop else end // TILE * TILE


def tiles_of(start: int, end: int) -> range:
    """The places, on the sequence's grid, of the tiles that the prompt tokens [start, end) lie in."""
    return range(start // TILE, (end - 1) // TILE + 1)


def decoding(computed: Ints, prefill_end: Ints, end: Ints) -> NDArray[np.bool_]:
    """[n] which sequences have a token to decode: their prompt is computed, and their last token is sampled and never
    computed."""
    found: NDArray[np.bool_] = (computed >= prefill_end) & (computed + 1 < end)
    return found


def padded_logits(rows: int) -> int:
    """Rows of logits of a step that samples so many."""
    return -(-rows // MIN_ROWS) * MIN_ROWS
