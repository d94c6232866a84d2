"""`Session`: where a part of a stage runs, how much time it has, and what it has found."""

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from gpu_check.findings import Findings

from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.gpu_triton import gpu_of

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ROOT / "benchmarks" / "shapes"
INTERPRETED = (torch.float32, torch.float16)  # the interpreter has no arithmetic in bfloat16
TYPES = (torch.bfloat16, torch.float16, torch.float32)
T = TypeVar("T")


@dataclass
class Session:
    """`smoke`: on the CPU in Triton's interpreter, in small sizes; every line but those for devices runs, untimed."""

    smoke: bool
    name: str
    until: float  # of time.monotonic(): when the part must have ended
    earlier: list[dict[str, Any]] = field(default_factory=list)  # what stages and parts before this one have found
    share: tuple[int, int] = (0, 1)  # which of how many parts that share what there is to do
    findings: Findings = field(default_factory=Findings)
    began: float = field(default_factory=time.monotonic)
    stopped: bool = False  # whether something was left out because the time was over

    @cached_property
    def device(self) -> torch.device:
        """The CPU in a smoke test."""
        return torch.device("cpu" if self.smoke else "cuda")

    @cached_property
    def gpu(self) -> Gpu:
        """What the kernels know of the device."""
        return gpu_of(self.device)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Floating-point types that are looked at."""
        return INTERPRETED if self.smoke else TYPES

    @property
    def dtype(self) -> torch.dtype:
        """Of models."""
        return torch.float32 if self.smoke else torch.bfloat16

    @property
    def left(self) -> float:
        """Seconds until the part must have ended."""
        return self.until - time.monotonic()

    def within_time(self, what: Iterable[T]) -> Iterator[T]:
        """Yield one after the other as long as there is time; a note says how many were left out."""
        waiting = list(what)
        for i, one in enumerate(waiting):
            if self.left <= 0:
                self.stopped = True
                self.findings.note(f"{self.name}: {len(waiting) - i} of {len(waiting)} cases left out: out of time")
                return
            yield one

    def own(self, what: Iterable[T]) -> list[T]:
        """This part's share."""
        which, of = self.share
        return list(what)[which::of]

    def rows(self, table: str) -> list[dict[str, Any]]:
        """What has been found for a table so far, by stages and parts before this one too."""
        parts = [*self.earlier, {"tables": self.findings.tables}]
        return [row for part in parts for row in part["tables"].get(table, [])]

    def pick(self, device: Any, smoke: Any) -> Any:
        """A size for the device, or the small one for a smoke test."""
        return smoke if self.smoke else device

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{self.name} {time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    def case(self, name: str) -> AbstractContextManager[None]:
        """See `Findings.case`."""
        return self.findings.case(name)

    def row(self, table: str, **columns: Any) -> None:
        """See `Findings.row`."""
        self.findings.row(table, **columns)

    def generator(self, seed: int = 0) -> torch.Generator:
        """Random numbers on the device, the same at every run."""
        return torch.Generator(self.device).manual_seed(seed)

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.smoke:
            torch.cuda.synchronize()


def name_of(dtype: torch.dtype) -> str:
    """bf16, fp16, fp32, int8, fp8."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "int8"}
    return names.get(dtype, "fp8" if dtype == torch.float8_e4m3fn else str(dtype).removeprefix("torch."))
