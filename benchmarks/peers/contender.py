"""One engine with one setting of it, ready to be measured."""

from collections.abc import Callable
from dataclasses import dataclass

from workload import Rates, Workload


@dataclass(frozen=True)
class Contender:
    engine: str
    setting: str
    measure: Callable[[Workload], Rates]  # one run in a process of its own
    best: bool = False  # it runs in every race, the other settings when they are asked for
