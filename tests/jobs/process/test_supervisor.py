"""The engine's keeper by itself, with an engine that does nothing: where no row can be to blame for a death."""

from pathlib import Path

import pytest

from batchinfer.engine.config import EngineConfig, EngineStats
from batchinfer.errors import EngineFailed
from batchinfer.jobs.process.in_flight import InFlight
from batchinfer.jobs.process.messages import Command, Heartbeat, Load, Message, Ready
from batchinfer.jobs.process.supervisor import Supervisor
from batchinfer.jobs.process.worker import Worker


class Idle(Worker):
    """A child process that says these messages, and then nothing."""

    def __init__(self, *messages: Message) -> None:
        self.messages = list(messages)
        self.sent: list[object] = []

    def send(self, command: Command) -> None:
        self.sent.append(command)

    def receive(self, timeout: float) -> Message | None:
        return self.messages.pop(0) if self.messages else None

    def close(self) -> None:
        self.sent.append("closed")


def test_an_engine_that_dies_while_it_has_no_rows_is_replaced_once() -> None:
    workers = [Idle(Ready(EngineStats()), Heartbeat(EngineStats(steps=3))), Idle()]
    started = iter(workers)
    supervisor = Supervisor(lambda: next(started), 60)
    load = Load(EngineConfig(Path("model")), None, False)
    supervisor.load(load)
    with pytest.raises(EngineFailed, match="too early"):
        supervisor.replace(InFlight(), EngineFailed("too early"))
    while supervisor.receive(0) is not None:
        pass
    supervisor.replace(InFlight(), EngineFailed("killed by SIGKILL"))
    assert (workers[0].sent, workers[1].sent) == ([load, "closed"], [load])
    assert supervisor.stats.steps == 3
    assert supervisor.stats.notes == ["the engine died and was started again 1 time: killed by SIGKILL"]
    with pytest.raises(EngineFailed, match="SIGKILL"):
        supervisor.replace(InFlight(), EngineFailed("killed by SIGKILL"))
