"""How long a kernel takes: replays of a CUDA graph, each behind a write that empties the L2 cache."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gpu_check.session import Session

FLUSHED = 256 << 20
"""Bytes that are written before each replay: several times what an L2 cache holds."""
REPEATS = 30
WARM_UP = 3


@dataclass(frozen=True)
class Times:
    """Of the repeats, in microseconds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, microseconds: list[float]) -> "Times":
        """The percentiles."""
        return cls(*(float(p) for p in np.percentile(microseconds, (20, 50, 80))))

    @property
    def seconds(self) -> float:
        """The median."""
        return self.p50 * 1e-6

    @property
    def columns(self) -> dict[str, float]:
        """For a table."""
        return {"p20, us": self.p20, "p50, us": self.p50, "p80, us": self.p80}


class Clock:
    """`clock(call)` times a call without arguments, whose launches are recorded once and replayed."""

    def __init__(self, session: Session) -> None:
        self.session = session
        if not session.smoke:
            self.flush = torch.empty(FLUSHED // 4, dtype=torch.int32, device=session.device)
            self.stream = torch.cuda.Stream()

    def __call__(self, call: Callable[[], object], repeats: int = REPEATS) -> Times:
        """Warm, record, replay."""
        if self.session.smoke:
            return self._once(call)
        # Off the stream that everything else is on, as recording asks for; kernels are compiled here too.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(self.stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for began, ended in marks:
            self.flush.zero_()
            began.record()
            graph.replay()
            ended.record()
        torch.cuda.synchronize()
        return Times.of([began.elapsed_time(ended) * 1e3 for began, ended in marks])

    def floor(self) -> Times:
        """Of a graph with a kernel that does next to nothing: a part of every figure."""
        one = torch.zeros(1, device=self.session.device)
        return self(lambda: one.add_(1))

    def plain(self, call: Callable[[], object], repeats: int = 10) -> Times:
        """Calls that take so long that neither launches nor caches count."""
        if self.session.smoke:
            return self._once(call)
        for _ in range(WARM_UP):
            call()
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for began, ended in marks:
            began.record()
            call()
            ended.record()
        torch.cuda.synchronize()
        return Times.of([began.elapsed_time(ended) * 1e3 for began, ended in marks])

    def _once(self, call: Callable[[], object]) -> Times:
        began = time.perf_counter()
        call()
        return Times.of([(time.perf_counter() - began) * 1e6])
