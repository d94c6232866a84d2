"""The engine at work, watched: another one takes its place when it dies or stands still."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from batchinfer.engine.config import EngineStats, added
from batchinfer.engine.request import Requests, RowError
from batchinfer.errors import EngineFailed, EngineKilled
from batchinfer.jobs.process.in_flight import UnderWay
from batchinfer.jobs.process.messages import Drain, Finished, Heartbeat, Load, Message, Ready, Rows, Stop
from batchinfer.jobs.process.suspects import Suspects
from batchinfer.jobs.process.worker import Worker

MOST_GIVEN_UP = 8
"""So many rows one after the other that kill the engine, and none that ends, are the engine's own fault."""


class Supervisor:
    """Passes rows to the engine, and on what it says. Rows that kill it again and again are found and given up."""

    def __init__(self, start_worker: Callable[[], Worker], step_timeout: float) -> None:
        self._start_worker = start_worker
        self._step_timeout = step_timeout
        self._worker = start_worker()
        self._suspects = Suspects()
        self._given_up: dict[int, RowError] = {}  # since another row ended: only then they are to blame
        self._deaths: Counter[str] = Counter()  # by what was said of them
        self._heard = 0.0  # when the engine last said something
        self._loaded = self._drained = False
        self._before = EngineStats()  # of engines that died
        self._stats = EngineStats()  # of the one at work
        self._notes: list[str] = []
        self.ready = 0.0  # when the first engine was loaded
        self.finished = False

    @property
    def stats(self) -> EngineStats:
        """Of all engines together, and what became of them."""
        died = [f"the engine was started again, {n} times: {said}" for said, n in self._deaths.items()]
        return replace(added(self._before, self._stats), notes=died + self._notes + self._stats.notes)

    @property
    def takes_all(self) -> bool:
        """False while rows run alone, to find those that kill the engine."""
        return not self._suspects.alone

    def load(self, load: Load) -> None:
        """What the engine, and each that replaces it, is to load."""
        self._load = load
        self._worker.send(load)

    def send(self, requests: Requests) -> None:
        """More rows."""
        self._heard = time.monotonic()
        self._worker.send(Rows(requests))

    def drain(self) -> None:
        """No more rows will come."""
        if not self._drained:
            self._worker.send(Drain())
            self._drained = True

    def stop(self) -> None:
        """Finish nothing more."""
        self._worker.send(Stop())

    def receive(self, timeout: float) -> Message | None:
        """What the engine says; None after `timeout` seconds. Raises `EngineFailed` where it is dead, or `Refused`."""
        message = self._worker.receive(timeout)
        if message is None:
            return None
        self._heard = time.monotonic()
        match message:
            case Ready():
                self._loaded = True
                self.ready = self.ready or self._heard
            case Heartbeat(stats):
                self._stats = stats
            case Finished(stats):
                self._stats = stats
                self.finished = True
        return message

    def check(self, under_way: UnderWay) -> None:
        """Raises `EngineFailed` where it has rows and took no step for too long."""
        waited = time.monotonic() - self._heard
        if self._loaded and len(under_way) and not self.finished and waited > self._step_timeout:
            raise EngineFailed(f"the engine took no step for {waited:.0f} s (--step-timeout {self._step_timeout})")

    def replace(self, under_way: UnderWay, error: EngineFailed) -> None:
        """Another engine goes on, without the rows that kill it.

        Raises `error` where no row can be to blame: before the first engine was loaded, or without any where an engine
        before it said the same.
        """
        # A step says what it began when it ends: of the first one nothing is known.
        rows = under_way.begun or [row for rest in under_way.requests([]) for row in rest.rows.tolist()]
        said = str(error).splitlines()[0]
        if not self.ready or (not rows and self._deaths[said]):
            raise error
        self._worker.close()
        self._deaths[said] += 1
        given_up = self._suspects.died(rows)
        code = RowError("engine_died", f"the engine died over this row alone: {said}"[:500])
        self._given_up |= dict.fromkeys(given_up, code)
        if len(self._given_up) > MOST_GIVEN_UP:
            raise error
        under_way.end(set(given_up))
        under_way.begin_again()
        if isinstance(error, EngineKilled):
            self._halve()
        self._before, self._stats = added(self._before, self._stats), EngineStats()
        self._loaded = self._drained = False
        self._worker = self._start_worker()
        self._worker.send(self._load)
        self._send_again(under_way)

    def ended(self, under_way: UnderWay, rows: set[int]) -> dict[int, RowError]:
        """Rows ended, so the engine can do those: others that it died over are to blame; the errors of them."""
        to_blame, self._given_up = self._given_up, {}
        under_way.end(rows)
        if self._suspects.finished(rows):
            self._send_again(under_way)
        return to_blame

    def close(self) -> None:
        """End the engine, at once if it still runs."""
        self._worker.close()

    def _halve(self) -> None:
        """Nobody but the system kills an engine like that, and it does so for want of memory."""
        config = self._load.config.halved()
        if config != self._load.config:
            self._load = replace(self._load, config=config)
            self._notes = [
                f"the engine was killed, for want of memory it seems: from then on {config.max_num_seqs} rows at most "
                f"ran side by side, in steps of {config.max_num_batched_tokens} tokens at most; --max-num-seqs and "
                "--max-num-batched-tokens say so from the start"
            ]

    def _send_again(self, under_way: UnderWay) -> None:
        """To a new engine, or after rows that ran alone: all unfinished rows that may run now."""
        for requests in under_way.requests(self._suspects.alone):
            self.send(requests)
