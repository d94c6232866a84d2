"""Limits of processor time and memory for chat templates, which are programs that come with a checkpoint."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_PAGE = resource.getpagesize()


class _Expired(BaseException):
    """Time is up. It derives from `BaseException` so that no `except Exception` in the limited code catches it."""


@contextmanager
def limited(seconds: float, nbytes: int) -> Iterator[None]:
    """Limit the code inside to `seconds` of processor time and `nbytes` of additional address space.

    Raises `TimeoutError`, or Python's own `MemoryError`. Time is limited in the main thread only, because Python
    delivers signals only there. It is checked between two bytecodes of the interpreter, so a single long operation is
    not interrupted: to bound those, the caller must bound memory and the size of integers. While this runs, the memory
    limit holds for all other threads too.
    """
    with _limited_memory(nbytes):
        if threading.current_thread() is threading.main_thread():
            with _limited_time(seconds):
                yield
        else:
            yield


@contextmanager
def _limited_memory(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb", buffering=0) as file:
        taken = int(file.read().split()[0]) * _PAGE
    most = taken + nbytes
    if soft != resource.RLIM_INFINITY:
        most = min(most, soft)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    armed = True

    def expire(number: int, frame: FrameType | None) -> None:
        if armed:
            raise _Expired

    before = signal.signal(signal.SIGVTALRM, expire)
    try:
        # The timer fires again every second, in case the code caught the first signal.
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)
        yield
    except _Expired:
        raise TimeoutError(f"took more than {seconds:g} seconds") from None
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
