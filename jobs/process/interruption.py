"""Interruption by Ctrl-C, SIGTERM, SIGUSR1 or a deadline: a flag that the job checks, instead of an exception."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Slurm sends USR1 before a job's time is up

# Two signals within this time count as one: a launcher passes on a signal that this process has got itself already.
SAME_SECONDS = 1.0


class Interruption:
    """A context in which the first signal sets `requested`. A second signal has its usual effect and ends the process.

    In other threads than the main one no signal is caught, since Python delivers signals to the main thread only.
    `requested` is also true once `time.monotonic()` reaches `deadline`.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self._signalled: float | None = None  # time.monotonic() of the first signal
        self._deadline = deadline
        self._catches = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Interruption":
        if self._catches:
            self._before = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if self._catches:
            self._restore()

    @property
    def requested(self) -> bool:
        return self._signalled is not None or (self._deadline is not None and time.monotonic() >= self._deadline)

    def _request(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled is None:
            self._signalled = now
        elif now - self._signalled > SAME_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextmanager
def ignoring_signals() -> Iterator[None]:
    """Let child processes that are started in this context ignore `SIGNALS`: the parent decides when they end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
