"""Showing a job's progress: a bar on a terminal or a line a minute in a log file, the metrics file, the heartbeat."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from batchinfer.engine.config import EngineStats
from batchinfer.jobs.heartbeat import Heartbeat
from batchinfer.jobs.log import say, writes_json
from batchinfer.jobs.metrics import Metrics
from batchinfer.jobs.run_state import RunState

LINE_SECONDS = 60.0  # between two lines
Item = TypeVar("Item")


class Progress:
    """Shows rows done, tokens a second and time left on stderr. Rates are measured from when the engine is ready.

    The job calls `tick` often, even while no row ends, so that lines appear then too.
    """

    def __init__(self, state: RunState, metrics: Metrics, heartbeat: Heartbeat) -> None:
        self._state = state
        self._metrics = metrics
        self._heartbeat = heartbeat
        self._due = state.clock() + LINE_SECONDS
        self._bar: tqdm[None] | None = None

    def enter(self, phase: str) -> None:
        """Note that another phase begins."""
        self._state.enter(phase)
        self._heartbeat.write()

    def generating(self) -> None:
        """Note that the engine is ready. For an engine that replaces the first one, this does nothing."""
        if not self._state.generating():
            return
        self._heartbeat.write()
        if self._draws:
            self._bar = tqdm(
                total=self._state.rows,
                initial=self._state.rows_done,
                unit=" rows",
                dynamic_ncols=True,
                leave=False,
                file=sys.stderr,
            )

    def update(self, stats: EngineStats) -> None:
        """Note the engine's statistics since it is ready."""
        self._state.update(stats)
        if self._bar is not None and self._state.pace is not None:
            self._bar.set_postfix_str(f"{self._state.pace.tokens_per_second:,.0f} tok/s", refresh=False)
            self._bar.update(self._state.rows_done - self._bar.n)

    def merging(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items from which the output is merged, and show progress meanwhile."""
        self.enter("merging")
        for item in items:
            self.tick()
            yield item

    def tick(self) -> None:
        """Write the heartbeat if it is due. Once a minute, print a line, unless a terminal shows the bar, and write the
        metrics."""
        self._heartbeat.tick()
        late = self._state.clock() - self._due
        if late < 0:
            return
        self._due += LINE_SECONDS * (1 + late // LINE_SECONDS)
        if not self._draws:
            self._say_line()
        self._metrics.write()

    def close(self) -> None:
        """Clear the bar."""
        if self._bar is not None:
            self._bar.close()

    @property
    def _draws(self) -> bool:
        """True if a bar is drawn in place of lines."""
        return sys.stderr.isatty() and not writes_json()

    def _say_line(self) -> None:
        state = self._state
        rows, total = state.rows_done, state.rows or 0
        line = f"{state.phase}: {rows:,} of {total:,} rows"
        figures: dict[str, Any] = {"rows_done": rows, "rows_total": state.rows}
        if state.pace is not None and state.phase == "generating":
            rate, left = state.pace.tokens_per_second, state.pace.left(total - rows)
            interval = "?" if left is None else tqdm.format_interval(left.estimate)
            line = f"{line}, {rate:,.0f} tok/s, {interval} left"
            figures |= {"tokens_per_second": rate, "seconds_left": None if left is None else left.estimate}
        say(line, state.phase, **figures)
