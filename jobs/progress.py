"""Showing a job's progress: a bar on a terminal or a line a minute in a log file, and the metrics file."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from batchinfer.jobs.collector import Results
from batchinfer.jobs.log import say
from batchinfer.jobs.metrics import Metrics

HEARTBEAT_SECONDS = 60.0
Item = TypeVar("Item")


class Progress:
    """Shows rows done, tokens a second and time left on stderr. Rates are measured from when the engine is ready.

    `clock` returns seconds. The job calls `tick` often, even while no row ends, so that lines appear then too.
    """

    def __init__(
        self, results: Results, total: int, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._results = results
        self._total = total  # rows of the input
        self._metrics = metrics
        self._clock = clock
        self._due = clock() + HEARTBEAT_SECONDS
        self._phase = "loading"
        self._bar: tqdm[None] | None = None

    def generating(self) -> None:
        """Note that the engine is ready. For an engine that replaces the first one, this does nothing."""
        if self._phase == "generating":
            return
        self._phase = "generating"
        self._began, self._before, self._tokens = self._clock(), self._results.rows, 0
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total, initial=self._before, unit=" rows", dynamic_ncols=True, leave=False, file=sys.stderr
            )

    def update(self, tokens: int) -> None:
        """Note how many tokens, of prompts and answers together, were computed since the engine is ready."""
        self._tokens = tokens
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._rate():,.0f} tok/s", refresh=False)
            self._bar.update(self._results.rows - self._bar.n)

    def merging(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items from which the output is merged, and show progress meanwhile."""
        self._phase = "merging"
        for item in items:
            self.tick()
            yield item

    def tick(self) -> None:
        """Once a minute, print a line, unless a terminal shows the bar, and write the metrics."""
        late = self._clock() - self._due
        if late < 0:
            return
        self._due += HEARTBEAT_SECONDS * (1 + late // HEARTBEAT_SECONDS)
        if not sys.stderr.isatty():
            say(self._line())
        self._metrics.write()

    def close(self) -> None:
        """Clear the bar."""
        if self._bar is not None:
            self._bar.close()

    def _line(self) -> str:
        rows = self._results.rows
        line = f"{self._phase}: {rows:,} of {self._total:,} rows"
        if self._phase != "generating":
            return line
        new = rows - self._before
        left = tqdm.format_interval((self._total - rows) * self._seconds() / new) if new else "?"
        return f"{line}, {self._rate():,.0f} tok/s, {left} left"

    def _rate(self) -> float:
        return self._tokens / self._seconds()

    def _seconds(self) -> float:
        return max(self._clock() - self._began, 1e-9)
