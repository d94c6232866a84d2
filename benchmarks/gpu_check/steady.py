"""Steps in which the same rows decode: how long they take, and what the profiler sees of them."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gpu_check.engines import drop, random_prompts, requests_of
from gpu_check.session import Session
from gpu_check.traces import STEP, Trace, read_trace

from batchinfer.engine.engine import Engine
from batchinfer.engine.transfer import Sampled

STEPS = 20
SETTLED = 24
"""Decoding steps before it is measured: shapes of steps have been met and recorded by then."""


@dataclass(frozen=True)
class Steady:
    """Of `STEPS` decoding steps."""

    wall_ms: float  # a step, without the profiler
    host_ms: float  # of it, the host at work: all but waiting for the step before
    replays: int
    trace: Trace


def watch_graphs(session: Session) -> None:
    """To be called before graphs are recorded: kernels in graphs that are older than the profiler may stay unseen."""
    if session.smoke:
        return
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities):
        torch.ones(1, device=session.device).add_(1)
        torch.cuda.synchronize()


def steady_steps(session: Session, engine: Engine, rows: int, prompt: int, vocab: int) -> Steady | None:
    """Let so many rows decode, side by side, and look at some steps; None in a smoke test, which only runs them."""
    watch_graphs(session)
    engine.runner.steps.recordings.clear()
    settled, count = session.pick((SETTLED, STEPS), (1, 1))
    # Their blocks are there for the last step too, and none of them ends before.
    engine.add(
        requests_of(random_prompts(rows, prompt, vocab, seed=2), min(3 * (settled + count), _room(engine, prompt)))
    )
    try:
        _until_all_decode(engine, rows)
        _step(engine, settled)
        session.synchronize()
        before, waited = engine.runner.steps.replays, 0.0
        with _waiting() as waits:
            began = time.perf_counter()
            _step(engine, count)
            wall = (time.perf_counter() - began) / count
            waited = sum(waits) / count
        session.synchronize()
        replays = engine.runner.steps.replays - before
        if session.smoke:
            return None
        return Steady(1e3 * wall, 1e3 * (wall - waited), replays, _profiled(engine, count))
    finally:
        drop(session, engine)


def _room(engine: Engine, prompt: int) -> int:
    return engine.table.max_tokens - prompt


def _until_all_decode(engine: Engine, rows: int) -> None:
    table = engine.table
    while True:
        running = np.flatnonzero(table.active)
        if len(running) == rows and bool((table.computed[running] >= table.prompt_length[running]).all()):
            return
        assert engine.unfinished >= rows, f"{len(running)} of {rows} rows run side by side: the pool is too small"
        engine.step()


def _step(engine: Engine, count: int) -> None:
    for _ in range(count):
        with torch.profiler.record_function(STEP):
            engine.step()


@contextmanager
def _waiting() -> Iterator[list[float]]:
    """Seconds of each wait for a step's tokens."""
    found: list[float] = []
    wait = Sampled.wait

    def timed(sampled: Sampled) -> object:
        began = time.perf_counter()
        try:
            return wait(sampled)
        finally:
            found.append(time.perf_counter() - began)

    Sampled.wait = timed
    try:
        yield found
    finally:
        Sampled.wait = wait


def _profiled(engine: Engine, count: int) -> Trace:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        _step(engine, count)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return read_trace(file)
