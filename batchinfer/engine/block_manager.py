"""`BlockManager`: who owns which block of the key-value pool."""

import numpy as np
from numpy.typing import NDArray


class BlockManager:
    """Blocks 1 to `blocks` - 1 of a pool; block 0 takes the writes of padding and belongs to nobody.

    A sequence is admitted with a promise of blocks, and takes them as it grows: what is promised is there. The lowest
    free blocks go first, so that those in use lie close together.
    """

    def __init__(self, blocks: int) -> None:
        self._free = np.ones(blocks, np.bool_)
        self._free[0] = False
        self._unpromised = blocks - 1

    def promise(self, count: int) -> bool:
        """Set blocks aside without naming them; False if there are too few."""
        if count > self._unpromised:
            return False
        self._unpromised -= count
        return True

    def take(self, count: int) -> NDArray[np.int64]:
        """Blocks out of what was promised before, int64 [count]."""
        taken = np.flatnonzero(self._free)[:count]
        assert len(taken) == count, "more blocks taken than promised"
        self._free[taken] = False
        return taken

    def release(self, blocks: NDArray[np.int64], promised: int) -> None:
        """Give back a sequence's blocks, and its whole promise, taken or not."""
        assert not self._free[blocks].any(), "a block released twice"
        self._free[blocks] = True
        self._unpromised += promised
