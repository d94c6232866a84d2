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
PROMPT = 512
TITLE = "A steady decoding step"
IDLE = 5.0
"""Percent of a step that the device may wait."""


@dataclass(frozen=True)
class Steady:
    """Of `STEPS` decoding steps."""

    wall_ms: float  # a step, without the profiler
    host_ms: float  # of it, the host at work: all but waiting for the step before
    replays: int
    trace: Trace


def watch_graphs(session: Session) -> None:
    """Call this before graphs are recorded: kernels in graphs that are older than the profiler may stay unseen."""
    if session.smoke:
        return
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities):
        torch.ones(1, device=session.device).add_(1)
        torch.cuda.synchronize()


def report_steady(session: Session, engine: Engine, name: str, rows: int, vocab: int) -> None:
    """A row of the table; a fault if steps were not replayed, or the host waited for the device in the midst of one."""
    steps = steady_steps(session, engine, rows, session.pick(PROMPT, 5), vocab)
    if steps is None:
        session.row(TITLE, weights=name, rows=rows, device="skipped: no device")
        return
    trace, idle = steps.trace, 100 * steps.trace.idle_share
    session.row(
        TITLE,
        weights=name,
        rows=rows,
        **{"step, ms": steps.wall_ms, "host at work, ms": steps.host_ms, "device idle, %": idle},
        **{"replayed": steps.replays, "of steps": trace.steps, "kernels a step": trace.kernels_per_step},
        **{"launches by the host": trace.launches_per_step, "waits for an event": trace.event_waits_per_step},
        **{"other waits": ", ".join(f"{n} {c}" for n, c in trace.waits.items()) or "none"},
        **{"allocations, in all": trace.allocations},
    )
    session.findings.aim(
        f"{name}, {rows} rows: the device idle for at most {IDLE:.0f} % of a step", f"{idle:.1f} %", idle <= IDLE
    )
    session.say(f"{rows} rows: {steps.wall_ms:.2f} ms, host {steps.host_ms:.2f} ms")
    events = trace.event_waits_per_step
    assert not trace.waits, f"the host waits for the device within steps: {trace.waits}"
    assert events <= 1, f"{events:.1f} waits for an event in a step, where one is for the step before"
    assert steps.replays == trace.steps, f"{steps.replays} of {trace.steps} steps were replayed"


def steady_steps(session: Session, engine: Engine, rows: int, prompt: int, vocab: int) -> Steady | None:
    """Let so many rows decode, side by side, and look at some steps; None in a smoke test, which only runs them."""
    settled, count = session.pick((SETTLED, STEPS), (1, 1))
    # Their blocks are there for the last step too, and none of them ends before.
    engine.add(
        requests_of(
            random_prompts(rows, prompt, vocab, seed=2),
            min(3 * (settled + count), _room(engine, prompt)),
            temperature=1.0,
        )
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
