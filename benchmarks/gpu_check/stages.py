"""The stages, each with the parts that it has and how they run."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_check.session import Session

SECONDS = 240
"""That a stage may take."""


@dataclass(frozen=True)
class Stage:
    """`how`: parts run "together" in one process; "apart", each in one of its own; or so and "at once"."""

    number: int
    title: str
    parts: dict[str, str]  # by name: the module and its function
    how: str

    def part(self, name: str) -> "Callable[[Session], None]":
        """The function of a part, its module imported only now: it may import torch and Triton."""
        module, _, function = self.parts[name].partition(":")
        found: Callable[[Session], None] = getattr(import_module(f"gpu_check.{module}"), function)
        return found


STAGES = (
    Stage(
        1,
        "Kernels against their references",
        {
            "rows": "right_rows:run",
            "rotation": "right_rows:run_rotation",
            "attention 64, 80": "right_attention:run_small_heads",
            "attention 96, 128": "right_attention:run_usual_heads",
            "attention 256": "right_attention:run_large_heads",
            "attention types": "right_attention:run_types",
            "attention windows": "right_attention:run_windows",
            "products": "right_products:run",
            "4-bit products": "right_products:run_four_bits",
            "4-bit products, types": "right_products:run_four_bits_of_other_types",
            "sampling": "right_sampling:run",
            "batches of products": "right_batches:run_products",
            "batches of attention": "right_batches:run_attention",
            "batches of a model": "right_batches:run_model",
        },
        "at once",
    ),
    Stage(
        2,
        "The engine against transformers",
        {
            "logits": "right_engine:run_logits",
            "greedy": "right_engine:run_greedy",
            "graphs": "right_engine:run_graphs",
            "alone": "right_engine:run_alone",
        },
        "together",
    ),
    Stage(
        3,
        "Kernels against ceilings",
        {
            "ceilings": "ceilings:run",
            "attention": "speed_attention:run",
            "rows": "speed_rows:run",
            "products": "speed_products:run",
        },
        "together",
    ),
    Stage(
        4,
        "Jobs end to end, Llama-3-8B's shape",
        {
            "w8a8-fp8": "end_to_end:run_fp8",
            "w8a8-int8": "end_to_end:run_int8",
            "w4a16": "end_to_end:run_four_bits",
            "bf16": "end_to_end:run_bf16",
            "w8a8-fp8, deterministic": "end_to_end:run_deterministic",
            "w8a8-fp8, kv int8": "end_to_end:run_fp8_kv_int8",
            "w8a8-fp8, kv bf16": "end_to_end:run_fp8_kv_bf16",
        },
        "apart",
    ),
    Stage(
        5,
        "Beside transformers' continuous batching",
        {"transformers": "beside_transformers:run_theirs", "batchinfer": "beside_transformers:run_ours"},
        "apart",
    ),
    Stage(
        6,
        "Inside a step",
        {
            "memory": "inside_step:run_memory",
            "replayed steps": "inside_step:run_replayed",
            "eager steps": "inside_step:run_eager",
        },
        "apart",
    ),
)


def stages_of(numbers: str) -> list[Stage]:
    """Of "1,3"; "" is all. A `ValueError` says what there is."""
    by_number = {str(stage.number): stage for stage in STAGES}
    wanted = [n.strip() for n in numbers.split(",") if n.strip()] or list(by_number)
    if unknown := [n for n in wanted if n not in by_number]:
        raise ValueError(f"--stages has {', '.join(unknown)}; there are {', '.join(by_number)}")
    return [by_number[n] for n in dict.fromkeys(wanted)]
