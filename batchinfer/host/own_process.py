"""What an engine asks of a process that it has to itself: a job's child, or a command that computes."""

import os

from batchinfer.host import allocator
from batchinfer.kernels.processor import ask_for_strict_mode


def own_process() -> None:
    """Set up this process to load models and to compute: before its first product, and again before it loads another.

    MKL adds in one order for any number of rows, torch takes every processor that the process may run on (by itself
    it leaves out the second thread of each core), and freed memory goes back to the system.
    `allocator.keep_freed_memory()` ends the last of these once the models are loaded. Somebody else's process, as
    a notebook's, is left as it is.
    """
    ask_for_strict_mode()
    import torch  # not by those who merely import this

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    allocator.return_freed_memory()
