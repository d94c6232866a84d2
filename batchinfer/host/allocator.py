"""How the C library's allocator treats large blocks: given back at once while loading, kept while running.

Only glibc has these knobs (`mallopt(3)`); elsewhere nothing is changed.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 1 << 25  # glibc refuses more


def return_freed_memory() -> None:
    """Blocks of a megabyte or more are mapped for themselves: freed weights leave no holes in the heap."""
    _mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def keep_freed_memory() -> None:
    """A step allocates what the step before has freed, so that its pages are not faulted in anew each time."""
    _mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    _mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def _mallopt(parameter: int, value: int) -> None:
    function = getattr(ctypes.CDLL(None), "mallopt", None)
    if function is not None:
        function(parameter, value)
