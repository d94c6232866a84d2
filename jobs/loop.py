"""Between the rows that wait and the engine: feed it ahead of its need, take what it finished, watch over it."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from batchinfer.config import EngineConfig, EngineStats, added
from batchinfer.jobs.interruption import Interruption
from batchinfer.jobs.progress import Progress
from batchinfer.jobs.results import Results
from batchinfer.jobs.spec import EngineFailed, Interrupted, JobSpec, Refused
from batchinfer.jobs.suspects import Suspects
from batchinfer.jobs.windows import Window, Windows
from batchinfer.jobs.worker import (
    Admitted,
    Completed,
    Drain,
    Finished,
    Heartbeat,
    Load,
    Message,
    Ready,
    Rows,
    Stop,
    Worker,
)
from batchinfer.request import Completions, Requests, RowError

POLL_SECONDS = 0.2
MOST_GIVEN_UP = 8
"""So many rows one after the other that kill the engine, and none that ends, are the engine's own fault."""
STOP_SHARE = 0.7  # of the time until the job must have ended: for the engine to end its step


@dataclass
class _Sent:
    """A window that the engine has: `left` of its rows are unfinished."""

    first: int
    prompt_tokens: NDArray[np.int32]  # [rows of the window]
    requests: Requests  # what the engine got, should another one need it
    unfinished: NDArray[np.bool_]  # [rows of the window]

    @property
    def left(self) -> int:
        return int(self.unfinished.sum())

    def rest(self) -> Requests:
        """The requests of the rows that are unfinished."""
        return self.requests.take(np.flatnonzero(self.unfinished[self.requests.rows - self.first]))


class Loop:
    """Runs all rows through the engine, which has about a window and a half of them; one more window waits, ready.

    An engine that dies, or takes no step for too long, is replaced. Rows that were under way run again, and those that
    kill it again and again become errors.
    """

    def __init__(
        self,
        spec: JobSpec,
        windows: Windows,
        results: Results,
        progress: Progress,
        start_worker: Callable[[], Worker],
        total: int,
    ) -> None:
        self._spec = spec
        self._windows = windows
        self._results = results
        self._progress = progress
        self._start_worker = start_worker
        self._worker = start_worker()
        self._suspects = Suspects()
        self._heard = 0.0  # when the engine last said something
        self._drained = False
        self._given_up: dict[int, RowError] = {}  # since another row ended: only then they are to blame
        self._deaths: Counter[str] = Counter()  # by what was said of them
        self._loaded = False
        self._stats = EngineStats()  # of the engine at work
        self._before = EngineStats()  # of those that died
        self._total = total  # rows of the input
        self._upcoming: Window | None = None
        self._sent: list[_Sent] = []
        self._running: set[int] = set()
        self._ready = 0.0
        self._final: EngineStats | None = None
        self.generate_seconds = 0.0  # from the engine's being ready to its last row

    def run(self, load: Load, interruption: Interruption) -> EngineStats:
        """Feed and take until the last row is done.

        Raises `EngineFailed`, `Refused` and `Interrupted`, with all finished rows committed; `OSError` where a part
        cannot be written.
        """
        try:
            return self._run(load, interruption)
        except EngineFailed as error:
            self._results.commit()
            raise EngineFailed(f"{error}{self._under_way()}") from error
        except (Refused, Interrupted):
            self._results.commit()
            raise
        finally:
            self._worker.close()
            self._progress.close()

    def _run(self, load: Load, interruption: Interruption) -> EngineStats:
        while self._reading:
            self._progress.tick()
            self._check(interruption)
            self._upcoming = self._windows.read()
        load = replace(load, config=replace(load.config, kv_cache_tokens=self._cache_tokens(load.config)))
        self._worker.send(load)
        while self._final is None:
            self._progress.tick()
            self._check(interruption)
            if self._reading:
                self._upcoming = self._windows.read()
            try:
                self._step()
            except EngineFailed as error:
                self._replace_worker(load, error)
            self._results.commit_if_due()
        self._check(interruption)
        if self._sent:
            raise EngineFailed(f"the engine ended with {sum(sent.left for sent in self._sent)} rows unfinished")
        self._blame()
        self._results.commit()
        notes = [f"the engine was started again, {n} times: {said}" for said, n in self._deaths.items()]
        return replace(added(self._before, self._final), notes=notes + self._final.notes)

    def _step(self) -> None:
        """Feed and take. Raises `EngineFailed` where the engine is dead or stands still."""
        if not self._suspects.alone:
            self._feed()
            if not self._drained and self._upcoming is None and self._windows.exhausted:
                self._worker.send(Drain())
                self._drained = True
        self._take(0.0 if self._reading else POLL_SECONDS)
        waited = time.monotonic() - self._heard
        if self._loaded and self._sent and self._final is None and waited > self._spec.step_timeout:
            raise EngineFailed(f"the engine took no step for {waited:.0f} s (--step-timeout {self._spec.step_timeout})")

    def _replace_worker(self, load: Load, error: EngineFailed) -> None:
        """Go on with another engine, without the rows that kill it. Raises `error` where no row can be to blame."""
        # A step says what it began when it ends: of the first one nothing is known.
        under_way = sorted(self._running) or [row for sent in self._sent for row in sent.rest().rows.tolist()]
        if not under_way or not self._ready:
            raise error
        self._results.commit()
        self._worker.close()
        given_up = set(self._suspects.died(under_way))
        code = RowError("engine_died", f"the engine died over this row alone: {str(error).splitlines()[0]}"[:500])
        self._given_up |= dict.fromkeys(sorted(given_up), code)
        if len(self._given_up) > MOST_GIVEN_UP:
            raise error
        self._end(given_up)
        self._deaths[str(error).splitlines()[0]] += 1
        self._loaded = False
        self._before = added(self._before, self._stats)
        self._running.clear()
        self._stats, self._drained = EngineStats(), False
        self._worker = self._start_worker()
        self._worker.send(load)
        self._send_again()

    def _send_again(self) -> None:
        """To a new engine, or after rows that ran alone: all unfinished rows that may run now."""
        self._heard = time.monotonic()
        alone = self._suspects.alone
        for sent in self._sent:
            rest = sent.rest()
            if alone:
                rest = rest.take(np.flatnonzero(np.isin(rest.rows, alone)))
            if len(rest):
                self._worker.send(Rows(rest))

    @property
    def _reading(self) -> bool:
        return self._upcoming is None and not self._windows.exhausted

    def _cache_tokens(self, config: EngineConfig) -> int:
        """Exact if the first window holds all rows; else twice what that one needs, as later rows may be longer."""
        need = self._windows.plan.kv_cache_tokens(config.max_num_seqs)
        if self._upcoming is None or self._upcoming.end == self._total:
            return need
        return min(2 * need, config.max_num_seqs * config.max_model_len)

    def _check(self, interruption: Interruption) -> None:
        """Raises what ends the job early."""
        if interruption.requested:
            self._stop()
            rows = self._results.rows
            kept = f"; they are committed in {self._results.folder.path}" if rows else ""
            raise Interrupted(f"stopped after {rows:,} of {self._total:,} rows{kept}")
        failed = self._results.failed
        if failed > self._spec.max_error_rate * self._total:
            codes = ", ".join(f"{code} {count:,}" for code, count in self._results.by_error.most_common())
            raise Refused(
                f"{failed:,} of {self._total:,} rows failed ({codes}), more than --max-error-rate "
                f"{self._spec.max_error_rate} allows"
            )

    def _stop(self) -> None:
        if self._ready:
            self._worker.send(Stop())
            deadline = time.monotonic() + STOP_SHARE * self._spec.grace
            while self._final is None and time.monotonic() < deadline:
                self._take(POLL_SECONDS)

    def _feed(self) -> None:
        window = self._upcoming
        hungry = not self._sent or self._sent[-1].left <= len(self._sent[-1].requests) // 2
        if window is None or not hungry:
            return
        self._upcoming = None
        if window.errors:
            self._results.refuse(window.errors)
        if len(window.requests):
            self._worker.send(Rows(window.requests))
            unfinished = np.zeros(window.end - window.first, np.bool_)
            unfinished[window.requests.rows - window.first] = True
            self._heard = time.monotonic()
            self._sent.append(_Sent(window.first, window.prompt_tokens, window.requests, unfinished))

    def _take(self, timeout: float) -> None:
        """Handle the messages that are there; where there are none, wait for one."""
        while self._final is None and (message := self._worker.receive(timeout)) is not None:
            self._handle(message)
            timeout = 0.0

    def _handle(self, message: Message) -> None:
        self._heard = time.monotonic()
        match message:
            case Ready():
                self._loaded = True
                if not self._ready:
                    self._ready = time.monotonic()
                    self._progress.generating()
            case Admitted(rows):
                self._running.update(rows)
            case Completed(completions):
                self.generate_seconds = time.monotonic() - self._ready
                self._complete(completions)
            case Heartbeat(stats):
                self._stats = stats
                total = added(self._before, stats)
                self._progress.update(total.prompt_tokens + total.completion_tokens)
            case Finished(stats):
                self._final = stats

    def _complete(self, completions: Completions) -> None:
        rows = completions.rows
        prompt_tokens = np.zeros(len(rows), np.int32)
        for sent in self._sent:
            mine = (rows >= sent.first) & (rows < sent.first + len(sent.prompt_tokens))
            prompt_tokens[mine] = sent.prompt_tokens[rows[mine] - sent.first]
        self._results.add(completions, prompt_tokens)
        self._blame()
        self._end(set(rows.tolist()))
        if self._suspects.finished(set(rows.tolist())):
            self._send_again()

    def _blame(self) -> None:
        """The engine can do other rows: those that it died over are to blame."""
        if self._given_up:
            self._results.refuse(self._given_up)
            self._given_up = {}

    def _end(self, rows: set[int]) -> None:
        """These rows are finished, one way or the other."""
        for sent in self._sent:
            mine = [row - sent.first for row in rows if sent.first <= row < sent.first + len(sent.unfinished)]
            sent.unfinished[mine] = False
        self._sent = [sent for sent in self._sent if sent.left]
        self._running.difference_update(rows)

    def _under_way(self) -> str:
        count = len(self._running)
        return f"; {count} rows were under way, the first of them row {min(self._running)}" if count else ""
