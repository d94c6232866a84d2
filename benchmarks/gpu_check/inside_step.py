"""Where memory goes, what a step launches, how long the host is at work, and that nobody waits for the device."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from gpu_check import end_to_end
from gpu_check.engines import drive, random_prompts, release, requests_of, shape_of
from gpu_check.session import SHAPES, Session
from gpu_check.steady import Steady, steady_steps, watch_graphs

from batchinfer.engine.engine import Engine

MEMORY = "Memory of the device, GB"
STEPS = "A steady decoding step"
ROWS = (1, 64, 256)
JOB = end_to_end.Job(256, 1000, 500)
IDLE = 5.0
"""Percent of a replayed step that the device may wait."""


def run_memory(session: Session) -> None:
    """By part, of the largest step: weights, pool, activations, and what is left over."""
    with _engine(session) as engine:
        vocab = engine.runner.decoder.config.vocab_size
        weights, pool = engine.runner.decoder.weight_bytes, engine.runner.kv_cache_bytes
        job = session.pick(JOB, end_to_end.SMOKE[0])
        if session.smoke:
            drive(session, engine, requests_of(random_prompts(job.rows, job.prompt, vocab), 2), 60.0)
            session.row(MEMORY, weights=weights / 1e9, pool=pool / 1e9, device="the rest is skipped: no device")
            return
        resting = torch.cuda.memory_allocated()
        for what, prompt, new in (("prompts", job.prompt, 1), ("decoding", 16, 24)):
            torch.cuda.reset_peak_memory_stats()
            drive(session, engine, requests_of(random_prompts(job.rows, prompt, vocab), new), 60.0)
            peak, free_total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()
            session.row(
                MEMORY,
                step=what,
                rows=job.rows,
                weights=weights / 1e9,
                pool=pool / 1e9,
                **{
                    "activations at the peak": (peak - resting) / 1e9,
                    "else allocated": (resting - weights - pool) / 1e9,
                },
                **{"peak allocated": peak / 1e9, "reserved": torch.cuda.memory_reserved() / 1e9},
                **{"in use on the device": (free_total[1] - free_total[0]) / 1e9, "of": free_total[1] / 1e9},
                **{"graphs recorded": len(engine.runner.steps.recordings)},
            )
        session.say(f"peak {peak / 1e9:.1f} GB")


def run_replayed(session: Session) -> None:
    """Steps as they are in a job."""
    with _engine(session) as engine:
        for rows in session.pick(ROWS, (2,)):
            with session.case(f"replayed steps of {rows} rows"):
                if (steps := _steady(session, engine, "replayed", rows)) is None:
                    continue
                idle = 100 * steps.trace.idle_share
                aim = f"{rows} rows: the device idle for at most {IDLE:.0f} % of a replayed step"
                session.findings.aim(aim, f"{idle:.1f} %", idle <= IDLE)
                assert steps.replays == steps.trace.steps, f"{steps.replays} of {steps.trace.steps} steps were replayed"
                _no_waits(steps)


def run_eager(session: Session) -> None:
    """The same steps, never recorded."""
    with _engine(session) as engine:
        engine.runner.steps.recording = False
        for rows in session.pick(ROWS, (2,)):
            with session.case(f"eager steps of {rows} rows"):
                if (steps := _steady(session, engine, "eager", rows)) is not None:
                    assert steps.replays == 0, f"{steps.replays} steps were replayed"
                    _no_waits(steps)


def _steady(session: Session, engine: Engine, how: str, rows: int) -> Steady | None:
    vocab = engine.runner.decoder.config.vocab_size
    steps = steady_steps(session, engine, rows, session.pick(512, 5), vocab)
    if steps is None:
        session.row(STEPS, how=how, rows=rows, device="skipped: no device")
        return None
    trace = steps.trace
    session.row(
        STEPS,
        how=how,
        rows=rows,
        **{"step, ms": steps.wall_ms, "host at work, ms": steps.host_ms},
        **{"kernels": trace.kernels_per_step, "launches by the host": trace.launches_per_step},
        **{"graphs launched": trace.replays_per_step, "waits for an event": trace.event_waits_per_step},
        **{"other waits": ", ".join(f"{n} {c}" for n, c in trace.waits.items()) or "none"},
        **{"allocations, in all": trace.allocations, "device idle, %": 100 * trace.idle_share},
    )
    session.say(f"{how}, {rows} rows: {steps.wall_ms:.2f} ms, host {steps.host_ms:.2f} ms")
    return steps


def _no_waits(steps: Steady) -> None:
    waits, events = steps.trace.waits, steps.trace.event_waits_per_step
    assert not waits, f"the host waits for the device within steps: {waits}"
    assert events <= 1, f"{events:.1f} waits for an event in a step, where one is for the step before"


@contextmanager
def _engine(session: Session) -> Iterator[Engine]:
    """8-bit weights and cache, as in stage 4."""
    watch_graphs(session)
    with tempfile.TemporaryDirectory() as folder:
        model = shape_of(session, SHAPES / "llama-3-8b", Path(folder))
        jobs = (session.pick(JOB, end_to_end.SMOKE[0]),)
        engine = end_to_end.load(session, model, end_to_end.FP8, jobs)
        session.say("loaded")
        yield engine
    del engine
    release(session)
