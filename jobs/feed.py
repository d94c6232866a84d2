"""Between the rows that wait and the engine: feed it ahead of its need, take what it finished."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np

from batchinfer.engine.config import EngineConfig, EngineStats
from batchinfer.engine.request import Completions
from batchinfer.errors import EngineFailed, Interrupted, Refused
from batchinfer.jobs.process.in_flight import InFlight
from batchinfer.jobs.process.interruption import Interruption
from batchinfer.jobs.process.messages import Admitted, Completed, Heartbeat, Load, Message, Ready
from batchinfer.jobs.process.supervisor import Supervisor
from batchinfer.jobs.process.worker import Worker
from batchinfer.jobs.progress import Progress
from batchinfer.jobs.results.collector import Results
from batchinfer.jobs.rows.token_file import cut
from batchinfer.jobs.rows.windows import Windows
from batchinfer.jobs.spec import JobSpec

POLL_SECONDS = 0.2
FOLLOWERS = 4096  # that are given their results at a time
FOLLOWERS_TOKENS = 1 << 20
STOP_SHARE = 0.7  # of the time until the job must have ended: for the engine to end its step


class Loop:
    """Runs all rows through the engine, which has about a piece and a half of them; others wait on disk, in order."""

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
        self._engine = Supervisor(start_worker, spec.step_timeout)
        self._in_flight = InFlight()
        self._total = total  # rows of the input
        self.generate_seconds = 0.0  # from the engine's being ready to its last row
        self.duplicates = 0  # rows that got the result of another one

    def run(self, load: Load, interruption: Interruption) -> EngineStats:
        """Feed and take until the last row is done.

        Raises `EngineFailed`, `Refused` and `Interrupted`, with all finished rows committed; `OSError` where a part
        cannot be written.
        """
        try:
            return self._run(load, interruption)
        except EngineFailed as error:
            self._results.commit()
            begun = self._in_flight.begun
            some = f"; {len(begun)} rows were under way, the first of them row {begun[0]}" if begun else ""
            raise EngineFailed(f"{error}{some}") from error
        except (Refused, Interrupted):
            self._results.commit()
            raise
        finally:
            self._engine.close()
            self._windows.close()
            self._progress.close()

    def _run(self, load: Load, interruption: Interruption) -> EngineStats:
        while self._windows.reading:
            self._progress.tick()
            self._check(interruption)
            self._read()
            self._results.commit_if_due()
        self._engine.load(replace(load, config=replace(load.config, kv_cache_tokens=self._cache_tokens(load.config))))
        while not self._engine.finished:
            self._progress.tick()
            self._check(interruption)
            if self._windows.reading:
                self._read()
            try:
                self._step()
            except EngineFailed as error:
                self._results.commit()
                self._engine.replace(self._in_flight, error)
            self._results.commit_if_due()
        self._check(interruption)
        if len(self._in_flight):
            raise EngineFailed(f"the engine ended with {len(self._in_flight)} rows unfinished")
        self._end(set())
        self._results.commit()
        return self._engine.stats

    def _step(self) -> None:
        """Feed and take. Raises `EngineFailed` where the engine is dead or stands still."""
        if self._engine.takes_all:
            self._feed()
            if self._windows.over:
                self._engine.drain()
        self._take(0.0 if self._windows.reading else POLL_SECONDS)
        self._engine.check(self._in_flight)

    def _read(self) -> None:
        if errors := self._windows.read():
            self._results.refuse(errors)

    def _cache_tokens(self, config: EngineConfig) -> int:
        """Exact if the first window holds all rows; else twice what that one needs, as later rows may be longer."""
        samples = self._spec.computed_samples
        need = samples * self._windows.figures.kv_cache_tokens(-(-config.max_num_seqs // samples))
        if self._windows.rows_read == self._total:
            return need
        return min(2 * need, config.max_num_seqs * config.max_model_len)

    def _check(self, interruption: Interruption) -> None:
        """Raises what ends the job early."""
        if interruption.requested:
            self._stop()
            rows = self._results.rows
            kept = f"; they are committed in {self._results.folder.path}" if rows else ""
            raise Interrupted(f"stopped after {rows:,} of {self._total:,} rows{kept}")
        self._results.refuse_too_many_errors(self._total)

    def _stop(self) -> None:
        if self._engine.ready:
            self._engine.stop()
            deadline = time.monotonic() + STOP_SHARE * self._spec.grace
            with suppress(EngineFailed):  # it ends either way
                while not self._engine.finished and time.monotonic() < deadline:
                    self._take(POLL_SECONDS)

    def _feed(self) -> None:
        if self._in_flight.enough:
            return
        requests = self._windows.next_chunk()
        if requests is not None:
            self._engine.send(requests)
            self._in_flight.add(requests)

    def _take(self, timeout: float) -> None:
        """Handle the messages that are there; where there are none, wait for one."""
        while not self._engine.finished and (message := self._engine.receive(timeout)) is not None:
            self._handle(message)
            timeout = 0.0

    def _handle(self, message: Message) -> None:
        match message:
            case Ready():
                self._progress.generating()
            case Admitted(rows):
                self._in_flight.begin(rows)
            case Completed(completions):
                self.generate_seconds = time.monotonic() - self._engine.ready
                self._complete(completions)
            case Heartbeat():
                stats = self._engine.stats
                self._progress.update(stats.prompt_tokens + stats.completion_tokens)

    def _complete(self, completions: Completions) -> None:
        prompt_tokens = self._in_flight.prompt_tokens(completions.rows)
        self._results.add(completions, prompt_tokens)
        samples = np.arange(self._spec.computed_samples)
        places, followers = self._windows.followers.take(completions.rows[:: len(samples)])
        theirs = (places[:, None] * len(samples) + samples).reshape(-1, len(samples))
        tokens = np.diff(completions.offsets)[theirs].sum(1)
        # One row may have the result of a million: they are written as they would be had they come one by one.
        for some in cut(tokens, FOLLOWERS, FOLLOWERS_TOKENS):
            given = completions.given_to(np.repeat(followers[some], len(samples)), theirs[some].ravel())
            self._results.add(given, prompt_tokens[theirs[some].ravel()])
            self.duplicates += len(followers[some])
            self._results.commit_if_due()
        self._end(set(completions.rows.tolist()))

    def _end(self, rows: set[int]) -> None:
        if errors := self._engine.ended(self._in_flight, rows):
            given_up = list(errors)
            places, followers = self._windows.followers.take(np.array(given_up))
            followed = {row: errors[given_up[place]] for row, place in zip(followers.tolist(), places, strict=True)}
            self._results.refuse(errors | followed)
            self.duplicates += len(followed)
