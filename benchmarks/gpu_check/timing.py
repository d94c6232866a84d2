"""How long a kernel takes: calls recorded in a CUDA graph, each behind a read that empties the L2 cache."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gpu_check.session import Session

FLUSHED = 256 << 20
"""Bytes that are read before each call: several times what an L2 cache holds. They are read and not written, because
lines that were written would go back to memory while the kernel runs that is timed."""
CALLS = 20
"""In one graph, so that launching it and its events count for a twentieth."""
REPEATS = 10
PLAIN_REPEATS = 10
WARM_UP = 3
Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Times of the repeats, in microseconds a call."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, microseconds: list[float]) -> "Times":
        """The percentiles."""
        return cls(*(float(p) for p in np.percentile(microseconds, (20, 50, 80))))

    def less(self, microseconds: float) -> "Times":
        """All of them without so much."""
        return Times(*(max(0.01, t - microseconds) for t in (self.p20, self.p50, self.p80)))

    @property
    def seconds(self) -> float:
        """The median."""
        return self.p50 * 1e-6

    @property
    def columns(self) -> dict[str, float]:
        """For a table."""
        return {"p20, us": self.p20, "p50, us": self.p50, "p80, us": self.p80}


class Clock:
    """`clock(call)` times a call without arguments: a graph of calls and flushes, less a graph of flushes alone."""

    def __init__(self, session: Session) -> None:
        self.session = session
        if not session.smoke:
            self.read = torch.zeros(FLUSHED // 4, dtype=torch.float32, device=session.device)
            self.into = torch.zeros((), dtype=torch.float32, device=session.device)
            self.stream = torch.cuda.Stream()
            self.flushing = self._recorded(lambda: None).p50

    def __call__(self, call: Call) -> Times:
        """Warm, record, replay. Kernels are compiled here too."""
        if self.session.smoke:
            return self._once(call)
        return self._recorded(call).less(self.flushing)

    def floor(self) -> Times:
        """Time a kernel that does next to nothing: that time is a part of every figure."""
        one = torch.zeros(1, device=self.session.device)
        return self(lambda: one.add_(1))

    def plain(self, call: Call) -> Times:
        """Calls that take so long that neither launches nor caches count."""
        if self.session.smoke:
            return self._once(call)
        for _ in range(WARM_UP):
            call()
        return self._marked(call, PLAIN_REPEATS)

    def _recorded(self, call: Call) -> Times:
        # Off the stream that everything else is on, as recording asks for.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                call()
                self._flush()
        torch.cuda.current_stream().wait_stream(self.stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                self._flush()
                call()
        graph.replay()
        times = self._marked(graph.replay, REPEATS)
        return Times(times.p20 / CALLS, times.p50 / CALLS, times.p80 / CALLS)

    def _flush(self) -> None:
        torch.amax(self.read, dim=0, out=self.into)

    def _marked(self, call: Call, repeats: int) -> Times:
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for began, ended in marks:
            began.record()
            call()
            ended.record()
        torch.cuda.synchronize()
        return Times.of([began.elapsed_time(ended) * 1e3 for began, ended in marks])

    def _once(self, call: Call) -> Times:
        began = time.perf_counter()
        call()
        return Times.of([(time.perf_counter() - began) * 1e6])
