"""Between the rows that wait and the engine: feed it ahead of its need, take what it finished, watch over it."""

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from batchinfer.config import EngineConfig, EngineStats
from batchinfer.jobs.interruption import Interruption
from batchinfer.jobs.progress import Progress
from batchinfer.jobs.results import Results
from batchinfer.jobs.spec import EngineFailed, Interrupted, JobSpec, Refused
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
from batchinfer.request import Completions

POLL_SECONDS = 0.2
STOP_SHARE = 0.7  # of the time until the job must have ended: for the engine to end its step


@dataclass
class _Sent:
    """A window that the engine has: `left` of its rows are unfinished."""

    first: int
    prompt_tokens: NDArray[np.int32]  # [rows of the window]
    rows: int  # of them with the engine at first
    left: int


class Loop:
    """Runs all rows through the engine, which has about a window and a half of them; one more window waits, ready."""

    def __init__(self, spec: JobSpec, windows: Windows, results: Results, worker: Worker, total: int) -> None:
        self._spec = spec
        self._windows = windows
        self._results = results
        self._worker = worker
        self._total = total  # rows of the input
        self._upcoming: Window | None = None
        self._sent: list[_Sent] = []
        self._running: set[int] = set()
        self._progress: Progress | None = None
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
            if self._progress is not None:
                self._progress.close()

    def _run(self, load: Load, interruption: Interruption) -> EngineStats:
        while self._reading:
            self._check(interruption)
            self._upcoming = self._windows.read()
        cache_tokens = self._cache_tokens(load.config)
        self._worker.send(replace(load, config=replace(load.config, kv_cache_tokens=cache_tokens)))
        drained = False
        while self._final is None:
            self._check(interruption)
            if self._reading:
                self._upcoming = self._windows.read()
            self._feed()
            if not drained and self._upcoming is None and self._windows.exhausted:
                self._worker.send(Drain())
                drained = True
            self._take(0.0 if self._reading else POLL_SECONDS)
            self._results.commit_if_due()
        self._check(interruption)
        if self._sent:
            raise EngineFailed(f"the engine ended with {sum(sent.left for sent in self._sent)} rows unfinished")
        self._results.commit()
        return self._final

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
        hungry = not self._sent or self._sent[-1].left <= self._sent[-1].rows // 2
        if window is None or not hungry:
            return
        self._upcoming = None
        if window.errors:
            self._results.refuse(window.errors)
        if rows := len(window.requests):
            self._worker.send(Rows(window.requests))
            self._sent.append(_Sent(window.first, window.prompt_tokens, rows, rows))

    def _take(self, timeout: float) -> None:
        """Handle the messages that are there; where there are none, wait for one."""
        while self._final is None and (message := self._worker.receive(timeout)) is not None:
            self._handle(message)
            timeout = 0.0

    def _handle(self, message: Message) -> None:
        match message:
            case Ready():
                self._ready = time.monotonic()
                self._progress = Progress(self._total)
            case Admitted(rows):
                self._running.update(rows)
            case Completed(completions):
                self.generate_seconds = time.monotonic() - self._ready
                self._complete(completions)
            case Heartbeat(stats):
                self._show(stats)
            case Finished(stats):
                self._final = stats

    def _complete(self, completions: Completions) -> None:
        rows = completions.rows
        prompt_tokens = np.zeros(len(rows), np.int32)
        for sent in self._sent:
            mine = (rows >= sent.first) & (rows < sent.first + len(sent.prompt_tokens))
            prompt_tokens[mine] = sent.prompt_tokens[rows[mine] - sent.first]
            sent.left -= int(mine.sum())
        self._sent = [sent for sent in self._sent if sent.left]
        self._running.difference_update(rows.tolist())
        self._results.add(completions, prompt_tokens)

    def _under_way(self) -> str:
        count = len(self._running)
        return f"; {count} rows were under way, the first of them row {min(self._running)}" if count else ""

    def _show(self, stats: EngineStats) -> None:
        if self._progress is not None:
            self._progress.update(self._results.rows, stats.prompt_tokens + stats.completion_tokens)
