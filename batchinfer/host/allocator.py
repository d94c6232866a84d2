"""Settings of the C library's allocator for large blocks: return freed ones to the system, or keep them.

A model is loaded with the first setting and run with the second. Only glibc has them (`mallopt(3)`); with another C
library nothing is changed.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 1 << 25  # glibc refuses more


def return_freed_memory() -> None:
    """Map each block of a megabyte or more separately, so that freed weights leave no holes in the heap."""
    _mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def keep_freed_memory() -> None:
    """Keep freed memory in the process. A step then reuses the pages of the step before without new page faults."""
    _mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    _mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def _mallopt(parameter: int, value: int) -> None:
    function = getattr(ctypes.CDLL(None), "mallopt", None)
    if function is not None:
        function(parameter, value)
