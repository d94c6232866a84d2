"""`Trace`: what the profiler's trace says of some steps: kernels on the device, calls of the host."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP = "steady step"
"""What each step is marked with."""
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelEx", "cuLaunchKernelEx", "cudaLaunchKernelExC")
REPLAY = "cudaGraphLaunch"
EVENT_WAIT = "cudaEventSynchronize"
BLOCKING = 20.0
"""Microseconds: a call that waits for an event and returns sooner has found that the event had happened, or has lost
too little to count as a wait."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "cuStreamSynchronize", "cuCtxSynchronize")
"""Calls that wait for the device; `cudaMemcpy` is the name of the copy that does, its twin is `cudaMemcpyAsync`."""

ALLOCATIONS = ("cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaMallocHost", "cudaFreeHost")
"""Calls that may wait for the device too, where memory is not taken from what is kept."""


@dataclass(frozen=True)
class Span:
    """Microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Trace:
    """Of marked steps, one after the other."""

    steps: int
    kernels: int
    idle_share: float  # of the time from the first thing on the device to the last
    busy_us: float  # the time in which the device did anything
    calls: Mapping[str, int]  # of the host within the steps, by name
    event_waits: int  # of them, waits for an event that had not happened: those of `BLOCKING` microseconds or more

    @property
    def kernels_per_step(self) -> float:
        """On the device, those in graphs too."""
        return self.kernels / self.steps

    @property
    def launches_per_step(self) -> float:
        """Kernels that the host launched one by one."""
        return sum(self.calls.get(name, 0) for name in LAUNCHES) / self.steps

    @property
    def replays_per_step(self) -> float:
        """Graphs that it launched."""
        return self.calls.get(REPLAY, 0) / self.steps

    @property
    def event_waits_per_step(self) -> float:
        """The engine waits once a step, for the step before; the host is idle then, and the device is not."""
        return self.event_waits / self.steps

    @property
    def waits(self) -> dict[str, int]:
        """Calls that should not be there, by name."""
        return {name: self.calls[name] for name in WAITS if self.calls.get(name)}

    @property
    def allocations(self) -> int:
        """Of memory of the device and of pinned memory, by the driver, in all steps."""
        return sum(self.calls.get(name, 0) for name in ALLOCATIONS)


def read_trace(file: Path) -> Trace:
    """From the Chrome trace that the profiler exports."""
    return trace_of(json.loads(file.read_text())["traceEvents"])


def trace_of(events: Iterable[Mapping[str, Any]]) -> Trace:
    """`ValueError` where there are no steps, or nothing ran on the device."""
    whole = [event for event in events if event.get("ph") == "X" and "dur" in event]
    steps = _spans(event for event in whole if event["name"] == STEP and event.get("cat") == "user_annotation")
    if not steps:
        raise ValueError(f"the trace has no {STEP!r}")
    start, end = steps[0].start, steps[-1].end
    device = [s for s in _spans(e for e in whole if e.get("cat") in ON_DEVICE) if start <= s.start <= end]
    kernels = [s for s in _spans(e for e in whole if e.get("cat") == "kernel") if start <= s.start <= end]
    if not kernels:
        raise ValueError("the trace has no kernels within the steps: the profiler does not see the device")
    calls = [s for s in _spans(e for e in whole if e.get("cat") in CALLS) if start <= s.start <= end]
    busy = _covered(device)
    wall = max(s.end for s in device) - device[0].start
    waits = sum(s.name == EVENT_WAIT and s.end - s.start >= BLOCKING for s in calls)
    return Trace(len(steps), len(kernels), 1 - busy / wall, busy, Counter(s.name for s in calls), waits)


def _spans(events: Iterable[Mapping[str, Any]]) -> list[Span]:
    found = [Span(e["name"], float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events]
    return sorted(found, key=lambda span: span.start)


def _covered(spans: Sequence[Span]) -> float:
    """Microseconds in which there is at least one of them, given by their starts."""
    covered, reached = 0.0, float("-inf")
    for span in spans:
        covered += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return covered
