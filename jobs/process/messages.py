"""The words that a job and its engine's process exchange."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from batchinfer.engine.config import EngineConfig, EngineStats
from batchinfer.engine.request import Completions, Requests


class Engine(Protocol):
    """What a job needs of an engine."""

    @property
    def unfinished(self) -> int: ...
    def add(self, requests: Requests) -> None: ...
    def step(self) -> Completions: ...
    def take_admitted(self) -> list[int]: ...
    def stats(self) -> EngineStats: ...


# "module:name" of what makes an `Engine` of an `EngineConfig` and a `Tokenizer`. Only the child imports it.
TORCH_ENGINE = "batchinfer.engine.own_engine:own_engine"


@dataclass(frozen=True)
class Load:
    """Parent to child, first: load this engine."""

    config: EngineConfig
    tokenizer: Path | None  # a folder, where it is not the model's own
    samples: int  # of a row


@dataclass(frozen=True)
class Rows:
    """Parent to child: more rows, in the order to run them."""

    requests: Requests


@dataclass(frozen=True)
class Drain:
    """Parent to child: no more rows will come; finish those that came."""


@dataclass(frozen=True)
class Stop:
    """Parent to child: finish nothing more."""


@dataclass(frozen=True)
class Ready:
    """Child to parent: the engine is loaded."""

    stats: EngineStats


@dataclass(frozen=True)
class Admitted:
    """Child to parent: rows that began. Those begun and not completed are what a fault may be owed to."""

    rows: list[int]


@dataclass(frozen=True)
class Completed:
    """Child to parent: rows that ended in one step."""

    completions: Completions


@dataclass(frozen=True)
class Heartbeat:
    """Child to parent, about once a second while it works."""

    stats: EngineStats


@dataclass(frozen=True)
class Fault:
    """Child to parent, last: the engine failed; `refused` where the model or a flag is to blame."""

    text: str
    refused: bool


@dataclass(frozen=True)
class Finished:
    """Child to parent, last: after `Drain` or `Stop`."""

    stats: EngineStats


@dataclass(frozen=True)
class Found:
    """Child to parent, last: what a child was to find out that does not run the job's rows."""

    value: Any


Command = Load | Rows | Drain | Stop


Message = Ready | Admitted | Completed | Heartbeat | Fault | Finished | Found
