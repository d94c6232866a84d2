"""Limits of processor time and memory for code that came with a checkpoint: a chat template is a program."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_PAGE = resource.getpagesize()


class _Expired(BaseException):
    """No `except Exception` on the way may take it for an error of its own."""


@contextmanager
def limited(seconds: float, nbytes: int) -> Iterator[None]:
    """Inside, the process may work `seconds` of processor time and take `nbytes` more address space.

    Raises `TimeoutError`; where memory runs out, Python's own `MemoryError`. The time is watched in the main thread
    only, as Python delivers signals nowhere else, and between two steps of the interpreter: who must bound a single
    step bounds the memory, and numbers of many digits. Other threads have the same limit of memory meanwhile.
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
        # Again a second later, should something have swallowed it.
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)
        yield
    except _Expired:
        raise TimeoutError(f"took more than {seconds:g} seconds") from None
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
