"""Ctrl-C, SIGTERM, SIGUSR1 and the clock as a question that the job asks, instead of an exception anywhere."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # USR1 is what Slurm sends before a job's time is up

# Signals so close together are one: who ends all processes of a job also reaches a launcher, which hands it on.
SAME_SECONDS = 1.0


class Interruption:
    """Inside, the first signal sets `requested`; a second one acts as it did before, and so ends all.

    Outside the main thread nothing is caught: Python delivers signals only there. `deadline` is a time of
    `time.monotonic` from which on it is requested too.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self._signalled: float | None = None  # when
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
    """Children started inside ignore these signals from their first instruction on: the parent decides for them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
