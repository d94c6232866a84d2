"""Feeding rows to the engine before it runs out of them, and taking its finished rows."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np

from batchinfer.engine.config import EngineConfig, EngineStats
from batchinfer.engine.request import Completions
from batchinfer.errors import EngineFailed, Interrupted, Refused
from batchinfer.jobs.amounts import count_of
from batchinfer.jobs.collector import Results
from batchinfer.jobs.log import say
from batchinfer.jobs.process.in_flight import InFlight
from batchinfer.jobs.process.interruption import Interruption
from batchinfer.jobs.process.messages import Admitted, Completed, Finished, Heartbeat, Load, Message, Ready
from batchinfer.jobs.process.supervisor import Supervisor
from batchinfer.jobs.process.worker import Worker
from batchinfer.jobs.progress import Progress
from batchinfer.jobs.rows.duplicates import told_alike
from batchinfer.jobs.rows.token_file import cut
from batchinfer.jobs.rows.windows import Windows
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.timeline import Timeline
from batchinfer.kernels.ragged import ranges

POLL_SECONDS = 0.2
FOLLOWERS = 4096  # most duplicates that are given their results at a time
FOLLOWERS_TOKENS = 1 << 20
STOP_SHARE = 0.7  # share of the grace time in which the engine may end its step; the rest is for committing


class Loop:
    """Runs all rows through the engine. The engine has about one and a half chunks of rows; the others wait on disk."""

    def __init__(
        self,
        spec: JobSpec,
        windows: Windows,
        results: Results,
        progress: Progress,
        timeline: Timeline,
        start_worker: Callable[[], Worker],
        total: int,
    ) -> None:
        self._spec = spec
        self._windows = windows
        self._results = results
        self._progress = progress
        self._timeline = timeline
        self._engine = Supervisor(start_worker, spec.step_timeout)
        self._in_flight = InFlight(spec.reasoning_format is not None)
        self._total = total  # rows of the input
        self.generate_seconds = 0.0  # from when the engine was ready to its last row
        self.duplicates = 0  # rows that got the result of another row

    def run(self, load: Load, interruption: Interruption) -> EngineStats:
        """Feed rows and take results until the last row is done.

        Raises `EngineFailed`, `Refused` and `Interrupted`, after all finished rows are committed, and `OSError` if a
        part cannot be written.
        """
        try:
            return self._run(load, interruption)
        except EngineFailed as error:
            self._results.commit()
            begun = self._in_flight.begun
            some = f"; in flight: {count_of(len(begun), 'row')}, first row {begun[0]}" if begun else ""
            raise EngineFailed(f"{error}{some}") from error
        except (Refused, Interrupted):
            self._results.commit()
            raise
        finally:
            self._engine.close()
            self._timeline.write()
            self._windows.close()
            self._progress.close()

    def _run(self, load: Load, interruption: Interruption) -> EngineStats:
        while self._windows.reading:
            self._progress.tick()
            self._check(interruption)
            self._read(interruption)
        if self._windows.over:  # without the engine: no row is left that can run
            self._results.commit()
            return replace(self._engine.stats, notes=["no row was left to compute, so no model was loaded"])
        for note in told_alike(self._spec, self._windows.figures):  # at once: the job may run for days
            say(note)
        say(f"loading {self._spec.model}", "loading", model=self._spec.model)
        self._progress.enter("loading")
        self._engine.load(replace(load, config=replace(load.config, kv_cache_tokens=self._cache_tokens(load.config))))
        while not self._engine.finished:
            self._progress.tick()
            self._check(interruption)
            if self._windows.reading:
                self._read(interruption)
            try:
                self._step()
            except EngineFailed as error:
                self._results.commit()
                self._engine.replace(self._in_flight, error)
            except Refused:
                if not self._engine.ready:  # rows that cannot run would hold the command back with other settings
                    self._results.drop()
                raise
            self._results.commit_if_due()
        self._check(interruption)
        if len(self._in_flight):
            raise EngineFailed(f"the engine ended with {len(self._in_flight)} rows unfinished")
        self._end(set())
        self._results.commit()
        return self._engine.stats

    def _step(self) -> None:
        """Feed rows and take results once. Raises `EngineFailed` if the engine is dead or takes no step."""
        if self._engine.takes_all:
            self._feed()
            if self._windows.over:
                self._engine.drain()
        self._take(0.0 if self._windows.reading else POLL_SECONDS)
        self._engine.check(self._in_flight)

    def _read(self, interruption: Interruption) -> None:
        if errors := self._windows.read():
            self._results.refuse(errors)
        self._results.commit_if_due()
        for batch in self._windows.take_reused():
            self._results.take_over(batch)
            self._results.commit_if_due()
            self._progress.tick()
            self._check(interruption)

    def _cache_tokens(self, config: EngineConfig) -> int:
        """Return how many tokens the KV cache must hold.

        This is exact if the first window has all rows. Else it is twice what that window needs, since later rows may be
        longer.
        """
        need = self._windows.figures.kv_cache_tokens(config.max_num_seqs)
        if self._windows.rows_read == self._total:
            return need
        return min(2 * need, config.max_num_seqs * config.max_model_len)

    def _check(self, interruption: Interruption) -> None:
        """Raise `Interrupted` or `Refused` if the job must end early."""
        if interruption.requested:
            self._stop()
            rows = self._results.rows
            kept = f"; they are committed in {self._results.folder.path}" if rows else ""
            raise Interrupted(
                f"stopped after {rows:,} of {self._total:,} rows{kept}; give the same command to continue"
            )
        self._results.refuse_too_many_errors(self._total)

    def _stop(self) -> None:
        if self._engine.ready:
            self._engine.stop()
            deadline = time.monotonic() + STOP_SHARE * self._spec.grace
            with suppress(EngineFailed):  # the job ends in any case
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
        """Handle all messages that have arrived. If there are none, wait up to `timeout` seconds for one."""
        while not self._engine.finished and (message := self._engine.receive(timeout)) is not None:
            self._handle(message)
            self._progress.tick()
            timeout = 0.0

    def _handle(self, message: Message) -> None:
        match message:
            case Ready():
                self._progress.generating()
                self._timeline.begin(self._results.rows)
            case Admitted(rows):
                self._in_flight.begin(rows)
            case Completed(completions):
                self.generate_seconds = time.monotonic() - self._engine.ready
                self._complete(completions)
            case Heartbeat() | Finished():
                stats = self._engine.stats
                self._progress.update(stats)
                # Once no row is left the engine measures the device, which is no generating.
                last_row = self._engine.ready + self.generate_seconds
                self._timeline.add(self._results.rows, stats, None if self._in_flight else last_row)

    def _complete(self, completions: Completions) -> None:
        firsts = completions.firsts
        rows, bounds = completions.rows[firsts], np.append(firsts, len(completions))
        asked = self._in_flight.asked(rows)
        self._results.add(completions, asked)
        indices, followers = self._windows.followers.take(rows)
        tokens = np.diff(completions.offsets[bounds])[indices]
        # A row may have a million duplicates. They are written a few at a time, so that commits keep their usual size.
        for some in cut(tokens, FOLLOWERS, FOLLOWERS_TOKENS):
            samples = np.diff(bounds)[indices[some]]
            theirs, _ = ranges(firsts[indices[some]], samples)
            given = completions.given_to(np.repeat(followers[some], samples), theirs)
            self._results.add(given, asked.take(indices[some]))
            self.duplicates += len(followers[some])
            self._results.commit_if_due()
        self._end(set(completions.rows.tolist()))

    def _end(self, rows: set[int]) -> None:
        if errors := self._engine.ended(self._in_flight, rows):
            given_up = list(errors)
            indices, followers = self._windows.followers.take(np.array(given_up))
            followed = {row: errors[given_up[index]] for row, index in zip(followers.tolist(), indices, strict=True)}
            self._results.refuse(errors | followed)
            self.duplicates += len(followed)
