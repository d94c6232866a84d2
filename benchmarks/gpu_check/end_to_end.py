"""Jobs of random prompts on Llama-3-8B's shape with random weights: tokens a second, beside what the device allows."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check import ceilings
from gpu_check.ceilings import Ceilings
from gpu_check.engines import Ran, drive, engine_of, random_prompts, release, requests_of, shape_of
from gpu_check.roofline import Device, Roofline
from gpu_check.session import SHAPES, Session
from gpu_check.steady import steady_steps

from batchinfer.cost.cost_model import CostModel, Requests
from batchinfer.engine.engine import Engine
from batchinfer.models.config import ModelConfig, read_model_config

TITLE = "Llama-3-8B's shape, random weights, random prompts, no end of text"
VARIANT_SECONDS = 6.0
"""That a case beside the first kind of weights has for its run; what is under way then counts so far, and is marked."""
LAST_SECONDS = 15.0
"""That a part keeps for what comes after a run."""


@dataclass(frozen=True)
class Job:
    """So many rows, each of so many prompt tokens and new ones."""

    rows: int
    prompt: int
    new: int
    seconds: float = 45.0


@dataclass(frozen=True)
class Weights:
    """A kind of weights and of cache, and what the cost model must know of it."""

    name: str
    settings: dict[str, Any]
    unit: str  # of the products: bf16, fp8, int8
    weight_bytes: float  # of an element in the layers
    kv_bytes: float
    shape: str = "llama-3-8b"


FP8_KV, BF16_KV = 1 + 4 / 128, 2.0  # with a scale for 128 numbers
FP8 = Weights("w8a8-fp8, kv fp8", {"quantization": "w8a8-fp8", "kv_cache_dtype": "fp8"}, "fp8", 1.0, FP8_KV)
MAIN = (Job(1024, 128, 128), Job(256, 1000, 1000), Job(160, 2048, 128))
VARIANT = (Job(96, 1000, 1000, VARIANT_SECONDS),)
SMOKE = (Job(2, 7, 3),)
WARM = (1, 3, 16, 37, 64, 100)
"""A kernel is compiled for one row, for multiples of 16 and for other numbers, and products have tiles by rows: as many
rows as the job has, these, and their prompts meet all of it."""


def run_fp8(session: Session) -> None:
    """What the engine is for: 8-bit weights, activations and cache, three jobs."""
    _run(session, FP8, MAIN, WARM, (1, 64, 256))


def run_int8(session: Session) -> None:
    """The same in int8."""
    settings = {"quantization": "w8a8-int8", "kv_cache_dtype": "int8"}
    _run(session, Weights("w8a8-int8, kv int8", settings, "int8", 1.0, FP8_KV), VARIANT)


def run_four_bits(session: Session) -> None:
    """Weights in 4 bits, in groups of 128."""
    four = Weights("w4a16, kv bf16", {}, "bf16", 0.5 + 2 / 128, BF16_KV, "llama-3-8b-w4a16")
    _run(session, four, VARIANT)


def run_bf16(session: Session) -> None:
    """Nothing quantized."""
    _run(session, Weights("bf16, kv bf16", {"quantization": "none"}, "bf16", 2.0, BF16_KV), VARIANT)


def run_deterministic(session: Session) -> None:
    """The same bits in any batch: what that costs, beside the first kind of weights."""
    settings = {**FP8.settings, "deterministic": True}
    _run(session, Weights("w8a8-fp8, kv fp8, deterministic", settings, "fp8", 1.0, FP8_KV), VARIANT)


def run_fp8_kv_int8(session: Session) -> None:
    """Another cache."""
    settings = {"quantization": "w8a8-fp8", "kv_cache_dtype": "int8"}
    _run(session, Weights("w8a8-fp8, kv int8", settings, "fp8", 1.0, FP8_KV), VARIANT)


def run_fp8_kv_bf16(session: Session) -> None:
    """Another cache."""
    _run(session, Weights("w8a8-fp8, kv bf16", {"quantization": "w8a8-fp8"}, "fp8", 1.0, BF16_KV), VARIANT)


def _run(
    session: Session,
    weights: Weights,
    jobs: tuple[Job, ...],
    warm: tuple[int, ...] = (37,),
    watched: tuple[int, ...] = (64,),
) -> None:
    """`watched`: rows of steady steps."""
    jobs = session.pick(jobs, SMOKE)
    ceiling = ceilings.known(session)
    with tempfile.TemporaryDirectory() as folder:
        model = shape_of(session, SHAPES / weights.shape, Path(folder))
        engine = load(session, model, weights, jobs, warm)
        session.say(f"loaded, {engine.runner.kv_cache_bytes / 1e9:.1f} GB of keys and values")
        config = read_model_config(model)
        for job in jobs:
            with session.case(f"{weights.name}, {job.prompt} in, {job.new} out, {job.rows} rows"):
                requests = requests_of(random_prompts(job.rows, job.prompt, config.vocab_size), job.new)
                seconds = min(job.seconds, max(session.left - LAST_SECONDS, 1.0))
                ran = drive(session, engine, requests, seconds)
                _report(session, engine, config, weights, job, ran, ceiling)
        with session.case(f"{weights.name}, steady steps"):
            _idle(session, engine, config, weights, watched)
        # Not `stats()`, which would measure the device's peak first.
        session.findings.notes += [f"{weights.name}: {note}" for note in engine._stats.notes]


def load(
    session: Session, model: Path, weights: Weights, jobs: tuple[Job, ...], warm: tuple[int, ...] = WARM
) -> Engine:
    """With room for the largest of the jobs, and warm."""
    longest = max(job.prompt + job.new for job in jobs)
    most = max(job.rows for job in jobs)
    tokens = max(job.rows * (job.prompt + job.new + 32) for job in jobs)
    settings = {"max_num_batched_tokens": session.pick(8192, 64), "gpu_memory_utilization": 0.9, **weights.settings}
    if session.smoke:
        settings["dtype"] = "float32"
    engine = engine_of(
        session, model, random_weights=True, max_model_len=longest, max_num_seqs=most, kv_cache_tokens=tokens,
        **settings,
    )  # fmt: skip
    vocab = engine.runner.decoder.config.vocab_size
    for rows in dict.fromkeys(session.pick((*warm, most), (2,))):
        requests = requests_of(random_prompts(rows, session.pick(33, 5), vocab, seed=1), session.pick(12, 2))
        drive(session, engine, requests, 60.0)
    return engine


def _report(
    session: Session, engine: Engine, config: ModelConfig, weights: Weights, job: Job, ran: Ran, ceiling: Ceilings
) -> None:
    model = CostModel.of(config, weights.kv_bytes)
    device = Device(ceiling.of(weights.unit), ceiling.bytes_per_second)
    roofline = Roofline(model, _weight_bytes(model, weights), device)
    # A run that was cut has computed a part of each row: rows of what it has done on average are what it is held to.
    new = max(1, round(ran.new_tokens / job.rows)) if ran.cut else job.new
    prompt = max(1, round(ran.prompt_tokens / job.rows)) if ran.cut else job.prompt
    requests = Requests(prompt, new)
    bound, serial = (
        job.rows * seconds(requests, max(ran.largest_batch, 1))
        for seconds in (roofline.bound_seconds, roofline.serial_seconds)
    )
    figures = {
        "tokens/s": ran.total_rate,
        "new tokens/s": ran.new_rate,
        "of the serial roofline, %": 100 * serial / ran.seconds,
        "of the bound, %": 100 * bound / ran.seconds,
    }
    session.row(
        TITLE,
        weights=weights.name,
        **{"in": job.prompt, "out": job.new, "rows": job.rows, "done": ran.rows},
        **figures,
        **{"largest batch": ran.largest_batch, "steps": ran.steps, "replayed": ran.replays},
        seconds=ran.seconds,
        **{"kv, GB": engine.runner.kv_cache_bytes / 1e9},
        cut=f"after {ran.seconds:.0f} s: {prompt} in and {new} out a row so far" if ran.cut else "",
    )
    session.say(f"{weights.name} {job.prompt}/{job.new}: {ran.total_rate:,.0f} tokens/s, cut: {ran.cut}")


def _weight_bytes(model: CostModel, weights: Weights) -> float:
    """Of an element on average: the head stays in 16 bits."""
    whole = model.linear_parameters + model.head_parameters
    return (model.linear_parameters * weights.weight_bytes + model.head_parameters * 2.0) / whole


def _idle(session: Session, engine: Engine, config: ModelConfig, weights: Weights, watched: tuple[int, ...]) -> None:
    """How long the device waits in a decoding step."""
    most = engine.table.active.size
    for rows in session.pick(watched, (2,)):
        if rows > most:
            continue
        steps = steady_steps(session, engine, rows, session.pick(128, 5), config.vocab_size)
        if steps is None:
            session.row("Steady decoding steps", weights=weights.name, rows=rows, device="skipped: no device")
            continue
        session.row(
            "Steady decoding steps",
            weights=weights.name,
            rows=rows,
            **{"step, ms": steps.wall_ms, "replayed": steps.replays, "device idle, %": 100 * steps.trace.idle_share},
            **{"kernels a step": steps.trace.kernels_per_step},
        )
    release(session)
