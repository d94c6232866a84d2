"""One engine with one setting of it, ready to be measured."""

from collections.abc import Callable
from dataclasses import dataclass

from workload import Rates


@dataclass(frozen=True)
class Contender:
    engine: str
    setting: str
    measure: Callable[[], Rates]  # one run of the workload in a process of its own
