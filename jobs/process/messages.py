"""The messages that a job and its engine's process exchange."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from batchinfer.engine.config import EngineConfig, EngineStats
from batchinfer.engine.request import Completions, Requests


class Engine(Protocol):
    """The interface of an engine, as a job uses it."""

    @property
    def unfinished(self) -> int: ...
    def add(self, requests: Requests) -> None: ...
    def step(self) -> Completions: ...
    def take_admitted(self) -> list[int]: ...
    def stats(self) -> EngineStats: ...


# "module:name" of the function that makes an `Engine` from an `EngineConfig` and a `Tokenizer`. Only the child process
# imports it.
TORCH_ENGINE = "batchinfer.engine.own_engine:own_engine"


@dataclass(frozen=True)
class Load:
    """Parent to child, first: load this engine."""

    config: EngineConfig
    tokenizer: Path | None  # folder of the tokenizer; None: the model's own
    samples: bool  # rows may have several samples


@dataclass(frozen=True)
class Rows:
    """Parent to child: run these rows too, in this order."""

    requests: Requests


@dataclass(frozen=True)
class Drain:
    """Parent to child: no more rows will come; finish those that were sent."""


@dataclass(frozen=True)
class Stop:
    """Parent to child: end now, without finishing more rows."""


@dataclass(frozen=True)
class Ready:
    """Child to parent: the engine is loaded."""

    stats: EngineStats


@dataclass(frozen=True)
class Admitted:
    """Child to parent: rows that began. If the engine dies, a row that began and did not end may be the cause."""

    rows: list[int]


@dataclass(frozen=True)
class Completed:
    """Child to parent: rows that ended in one step."""

    completions: Completions


@dataclass(frozen=True)
class Heartbeat:
    """Child to parent, about once a second while the engine works: statistics so far."""

    stats: EngineStats


@dataclass(frozen=True)
class Fault:
    """Child to parent, last message: the engine failed. `refused` is true if the model or a flag is the cause."""

    text: str
    refused: bool


@dataclass(frozen=True)
class Finished:
    """Child to parent, last message, after `Drain` or `Stop`: final statistics."""

    stats: EngineStats


@dataclass(frozen=True)
class Found:
    """Child to parent, last message of a child that does not run the job's rows: its result."""

    value: Any


Command = Load | Rows | Drain | Stop


Message = Ready | Admitted | Completed | Heartbeat | Fault | Finished | Found
