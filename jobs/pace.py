"""`Pace`: how fast a run goes, and how long the rows that are left will take."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

RECENT_SECONDS = 300.0
SAMPLE_SECONDS = 5.0


@dataclass(frozen=True)
class TimeLeft:
    """Seconds until the last row ends, and their range."""

    estimate: float
    low: float
    high: float | None  # None: nothing bounds it


class Pace:
    """Measures a run's rates from when its engine is ready. `clock` returns seconds."""

    def __init__(self, rows: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`rows` were done before."""
        self._clock = clock
        self._began = clock()
        self._ended: float | None = None
        self._before = self._rows = rows
        self._tokens = 0
        self._recent = deque([(self._began, rows)])  # (when, rows done)

    def note(self, rows: int, tokens: int) -> None:
        """Note how many rows are done, and how many tokens were computed since the engine is ready."""
        self._rows, self._tokens = rows, tokens
        now = self._clock()
        if now - self._recent[-1][0] >= SAMPLE_SECONDS:
            self._recent.append((now, rows))
        while now - self._recent[0][0] > RECENT_SECONDS and len(self._recent) > 1:
            self._recent.popleft()

    def end(self) -> None:
        """Note that the last row has ended: the rates stay as they are."""
        self._ended = self._clock()

    @property
    def seconds(self) -> float:
        """Seconds since the engine is ready, until the end."""
        return max((self._clock() if self._ended is None else self._ended) - self._began, 1e-9)

    @property
    def rows_per_second(self) -> float:
        return (self._rows - self._before) / self.seconds

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self.seconds

    def left(self, rows: int) -> TimeLeft | None:
        """Return the time that `rows` more rows will take; None if no row has ended yet, from which it could be told.

        The estimate goes by the rate of the whole run. The range reaches to the rate of the last five minutes, more or
        less the square root of the rows that ended in them: so it is wide where few rows have ended.
        """
        rate = self.rows_per_second
        if rate <= 0:
            return None
        since, before = self._recent[0]
        seconds, recent = max(self._clock() - since, 1e-9), self._rows - before
        slowest = min(rate, (recent - sqrt(recent)) / seconds)
        fastest = max(rate, (recent + sqrt(recent)) / seconds)
        return TimeLeft(rows / rate, rows / fastest, rows / slowest if slowest > 0 else None)
