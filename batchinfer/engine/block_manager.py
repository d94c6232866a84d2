"""`BlockManager`: keeps track of which blocks of the KV cache are free, promised or taken.

States of layers that are no attention are handed out in the same way: there a state takes the place of a block.
"""

import numpy as np
from numpy.typing import NDArray


class BlockManager:
    """Manages the blocks of a pool from 1 on; block 0 takes the writes of padding and belongs to no sequence.

    A sequence is admitted with a promise of blocks, and takes them as it grows; promised blocks never run out. The
    lowest free blocks are taken first, so that blocks in use lie close together.
    """

    def __init__(self, blocks: int) -> None:
        self._free = np.ones(blocks, np.bool_)
        self._free[0] = False
        self.blocks = blocks - 1  # that sequences may have
        self._unpromised = self.blocks

    @property
    def unpromised(self) -> int:
        """Number of blocks that can still be promised."""
        return self._unpromised

    @property
    def used(self) -> float:
        """Share of the blocks that are taken."""
        return 1.0 - float(self._free[1:].sum()) / max(self.blocks, 1)

    def promise(self, count: int) -> bool:
        """Reserve `count` blocks without choosing them; return False if too few are left."""
        if count > self._unpromised:
            return False
        self._unpromised -= count
        return True

    def take(self, count: int) -> NDArray[np.int64]:
        """Take `count` blocks that were promised before; return them, int64 [count]."""
        taken = np.flatnonzero(self._free)[:count]
        assert len(taken) == count, "more blocks taken than promised"
        self._free[taken] = False
        return taken

    def release(self, blocks: NDArray[np.int64], promised: int) -> None:
        """Free a sequence's blocks and end its promise of `promised` blocks, taken or not."""
        assert not self._free[blocks].any(), "a block released twice"
        self._free[blocks] = True
        self._unpromised += promised
