"""Watching the engine's process, and starting another one when it dies or takes no step for too long."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from batchinfer.engine.config import EngineStats, added
from batchinfer.engine.request import Requests, RowError
from batchinfer.errors import EngineFailed, EngineKilled
from batchinfer.jobs.amounts import count_of
from batchinfer.jobs.process.in_flight import InFlight
from batchinfer.jobs.process.messages import Drain, Finished, Heartbeat, Load, Message, Ready, Rows, Stop
from batchinfer.jobs.process.suspects import Suspects
from batchinfer.jobs.process.worker import Worker

MOST_GIVEN_UP = 8
"""If more rows than this are given up and no row ends in between, the engine itself is taken to be at fault."""


class Supervisor:
    """Sends rows to the engine and passes on its messages. Finds rows that kill it repeatedly, and gives them up."""

    def __init__(self, start_worker: Callable[[], Worker], step_timeout: float) -> None:
        self._start_worker = start_worker
        self._step_timeout = step_timeout
        self._worker = start_worker()
        self._suspects = Suspects()
        self._given_up: dict[int, RowError] = {}  # since a row last ended; they fail only once another row ends
        self._deaths: Counter[str] = Counter()  # by message
        self._heard = 0.0  # time.monotonic() of the engine's last message
        self._loaded = self._drained = False
        self._before = EngineStats()  # sum over the engines that died
        self._stats = EngineStats()  # of the engine at work
        self._notes: list[str] = []
        self.ready = 0.0  # time.monotonic() at which the first engine was loaded; 0 before
        self.finished = False

    @property
    def stats(self) -> EngineStats:
        """Statistics summed over all engines, with notes on those that died."""
        died = [
            f"the engine died and was started again {count_of(n, 'time')}: {said}" for said, n in self._deaths.items()
        ]
        return replace(added(self._before, self._stats), notes=died + self._notes + self._stats.notes)

    @property
    def takes_all(self) -> bool:
        """False while rows run alone, to find those that kill the engine."""
        return not self._suspects.alone

    def load(self, load: Load) -> None:
        """Have the engine, and each engine that replaces it, load this."""
        self._load = load
        self._worker.send(load)

    def send(self, requests: Requests) -> None:
        """Send the engine more rows."""
        self._heard = time.monotonic()
        self._worker.send(Rows(requests))

    def drain(self) -> None:
        """Tell the engine, once, that no more rows will come."""
        if not self._drained:
            self._worker.send(Drain())
            self._drained = True

    def stop(self) -> None:
        """Tell the engine to end without finishing more rows."""
        self._worker.send(Stop())

    def receive(self, timeout: float) -> Message | None:
        """Return the engine's next message, or None after `timeout` seconds.

        Raises `EngineFailed` if the engine failed or died, and `Refused` if it refused the model or a flag.
        """
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

    def check(self, in_flight: InFlight) -> None:
        """Raise `EngineFailed` if the engine has rows and took no step for longer than the step timeout."""
        waited = time.monotonic() - self._heard
        if self._loaded and len(in_flight) and not self.finished and waited > self._step_timeout:
            raise EngineFailed(
                f"the engine took no step for {waited:.0f} s; --step-timeout allows {self._step_timeout:g} s"
            )

    def replace(self, in_flight: InFlight, error: EngineFailed) -> None:
        """Start another engine, which goes on without the rows that kill the engine.

        Raises `error` if no row can be the cause: if no engine was ever loaded, or if this engine had no rows and an
        earlier engine died with the same message. Also raises it if more than `MOST_GIVEN_UP` rows were given up.
        """
        # The engine reports the rows that it began at the end of a step. If it died in its first step, none is known.
        rows = in_flight.begun or [row for rest in in_flight.requests([]) for row in rest.rows.tolist()]
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
        in_flight.end(set(given_up))
        in_flight.begin_again()
        if isinstance(error, EngineKilled):
            self._halve()
        self._before, self._stats = added(self._before, self._stats), EngineStats()
        self._loaded = self._drained = False
        self._worker = self._start_worker()
        self._worker.send(self._load)
        self._send_again(in_flight)

    def ended(self, in_flight: InFlight, rows: set[int]) -> dict[int, RowError]:
        """Note that rows ended. So the engine itself works: returns the errors of the rows that were given up
        before."""
        to_blame, self._given_up = self._given_up, {}
        in_flight.end(rows)
        if self._suspects.finished(rows):
            self._send_again(in_flight)
        return to_blame

    def close(self) -> None:
        """Kill the engine's process if it still runs."""
        self._worker.close()

    def _halve(self) -> None:
        """Halve the size of the engine's steps: it was killed with SIGKILL, most likely by the system for lack of
        memory."""
        config = self._load.config.halved()
        if config != self._load.config:
            self._load = replace(self._load, config=config)
            self._notes = [
                f"the engine was killed, probably for lack of memory; after that at most {config.max_num_seqs} rows "
                f"ran side by side, in steps of at most {config.max_num_batched_tokens} tokens; to begin with these "
                "limits, give them as --max-num-seqs and --max-num-batched-tokens"
            ]

    def _send_again(self, in_flight: InFlight) -> None:
        """Send all unfinished rows that may run now, to a new engine or after rows that ran alone."""
        for requests in in_flight.requests(self._suspects.alone):
            self.send(requests)
