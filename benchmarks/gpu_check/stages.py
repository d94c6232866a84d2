"""The runs: the stages of each, their parts, and the seconds that each stage has."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_check.session import Session

PROCESSES = 16
"""Processes that compile side by side: as many as a rented machine has cores."""
ENGINES = 7
"""Number of these processes that compile what engines call."""


@dataclass(frozen=True)
class Stage:
    """Parts that run in one process, one after the other; or `at_once`, each in a process of its own."""

    name: str
    title: str
    seconds: float
    parts: dict[str, str]  # by name: the module and its function
    at_once: bool = False

    def share(self, name: str) -> tuple[int, int]:
        """(which of the parts with this part's function it is, how many those are): they share what there is to do."""
        alike = [part for part, place in self.parts.items() if place == self.parts[name]]
        return alike.index(name), len(alike)

    def part(self, name: str) -> "Callable[[Session], None]":
        """The function of a part, its module imported only now: it may import torch and Triton."""
        module, _, function = self.parts[name].partition(":")
        found: Callable[[Session], None] = getattr(import_module(f"gpu_check.{module}"), function)
        return found


def _shares(what: str, place: str, count: int) -> dict[str, str]:
    return {f"{what}, share {i + 1} of {count}": place for i in range(count)}


COMPILE = Stage(
    "1.1", "Every shipped kernel, compiled", 70, _shares("compile", "compiled:run", PROCESSES), at_once=True
)
CEILINGS = Stage("1.2", "What the device can do", 25, {"ceilings": "ceilings:run"})
SANITIZER = Stage(
    "1.3",
    "Small cases under compute-sanitizer",
    60,
    {
        "memcheck": "tools:run_memcheck",
        "initcheck": "tools:run_initcheck",
        "racecheck": "tools:run_racecheck",
    },
    at_once=True,
)
KERNELS = Stage(
    "1.4",
    "Kernels against float64",
    135,
    {
        "rows": "right_rows:run",
        "rotation": "right_rows:run_rotation",
        "attention 64, 80": "right_attention:run_small_heads",
        "attention 96, 128": "right_attention:run_usual_heads",
        "attention 256": "right_attention:run_large_heads",
        "attention types": "right_attention:run_types",
        "attention windows": "right_attention:run_windows",
        "products": "right_products:run_floating",
        "8-bit products": "right_products:run_eight_bits",
        "4-bit products": "right_products:run_four_bits",
        "4-bit products, types": "right_products:run_four_bits_of_other_types",
        "experts": "right_experts:run",
        "sampling": "right_sampling:run",
        "batches of products": "right_batches:run_products",
        "batches of attention": "right_batches:run_attention",
    },
    at_once=True,
)
ENGINE = Stage(
    "1.5",
    "The engine against transformers, and against itself",
    105,
    {
        "logits": "right_engine:run_logits",
        "greedy": "right_engine:run_greedy",
        "8-bit and 4-bit weights": "right_quantized:run",
        "graphs": "right_engine:run_graphs",
        "alone": "right_engine:run_alone",
        "batches of a model": "right_batches:run_model",
    },
    at_once=True,
)
SMALL_CARD = Stage("1.6", "An 8B model on a card of 24 GB", 25, {"24 GB": "end_to_end:run_small_card"})
FIRST_CALLS = Stage(
    "2.1",
    "First calls, which compile what is timed",
    60,
    {
        **_shares("engines", "end_to_end:run_first_calls", ENGINES),
        **_shares("kernels", "speed:run_first_calls", PROCESSES - ENGINES),
    },
    at_once=True,
)
SPEED = Stage(
    "2.2",
    "Kernels beside ceilings and the vendor's",
    65,
    {"ceilings": "ceilings:run", "kernels": "speed:run"},
)
JOBS = (
    Stage("2.3", "Jobs: 8-bit weights and cache", 48, {"w8a8-fp8": "end_to_end:run_fp8"}),
    Stage("2.4", "Jobs: 4-bit weights", 32, {"w4a16": "end_to_end:run_four_bits"}),
    Stage("2.5", "Jobs: nothing quantized", 25, {"bf16": "end_to_end:run_bf16"}),
    Stage("2.6", "Jobs without drafts and shared prefixes", 22, {"plain": "end_to_end:run_plain"}),
    Stage("2.7", "Host time of a small model", 18, {"852M": "end_to_end:run_small_model"}),
)
COUNTERS = Stage("2.8", "The slowest kernels under ncu", 28, {"ncu": "tools:run_ncu"})
THEIRS = Stage("3.1", "transformers' continuous batching", 120, {"transformers": "beside_transformers:run_theirs"})
OURS = Stage("3.2", "The same prompts in this engine", 100, {"batchinfer": "beside_transformers:run_ours"})
SWEEP = Stage("4.1", "Other tiles and plans", 240, {"attention": "sweep:run"})


@dataclass(frozen=True)
class Run:
    """Stages one after the other. What one of them leaves of its seconds, those after it have."""

    name: str
    stages: tuple[Stage, ...]
    seconds: float  # all that it may take

    def ends(self, stage: Stage) -> float:
        """Seconds from the run's start at which a stage must have ended."""
        return sum(s.seconds for s in self.stages[: self.stages.index(stage) + 1])


RUNS = (
    Run("1", (COMPILE, CEILINGS, SANITIZER, KERNELS, ENGINE, SMALL_CARD), 420),
    Run("2", (FIRST_CALLS, SPEED, *JOBS, COUNTERS), 300),
    Run("transformers", (THEIRS, OURS), 240),
    Run("sweep", (SWEEP,), 240),
)


def run_of(name: str) -> Run:
    """The run of this name. Raises `ValueError` with the names that there are."""
    for run in RUNS:
        if run.name == name:
            return run
    raise ValueError(f"--run is {name!r}; it must be one of {', '.join(run.name for run in RUNS)}")


def stage_of(name: str) -> Stage:
    """The stage of this name, of whichever run."""
    return next(stage for run in RUNS for stage in run.stages if stage.name == name)
