"""Jobs on Llama-3-8B's shape with random weights: tokens a second, steps replayed, and what the device waits for."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_check import ceilings
from gpu_check.ceilings import Ceilings
from gpu_check.engines import Ran, compiled_programs, drive, engine_of, random_prompts, release, requests_of, shape_of
from gpu_check.jobs import JOBS, SMOKE, Job
from gpu_check.roofline import Device, Roofline
from gpu_check.session import SHAPES, Session
from gpu_check.steady import report_steady, watch_graphs

from batchinfer.cost.cost_model import CostModel, Requests
from batchinfer.engine.config import Speculation
from batchinfer.engine.engine import Engine
from batchinfer.models.config import ModelConfig, read_model_config

TITLE = "Jobs, random weights, random prompts, no end of text"
LAST_SECONDS = 6.0
"""Seconds that a part keeps for what comes after a job."""
SMALL_CARD = 24e9
"""Bytes of a card that an 8B model in 16 bits fits."""


@dataclass(frozen=True)
class Weights:
    """A kind of weights and of cache, and what the cost model must know of it."""

    name: str
    settings: dict[str, Any]
    unit: str  # of the products: bf16, fp8, int8
    weight_bytes: float  # of an element in the layers
    kv_bytes: int
    shape: str = "llama-3-8b"


FP8_KV, BF16_KV = 1, 2
FP8 = Weights("w8a8-fp8, kv fp8", {"quantization": "w8a8-fp8", "kv_cache_dtype": "fp8"}, "fp8", 1.0, FP8_KV)
FOUR = Weights("w4a16, kv bf16", {}, "bf16", 0.5 + 2 / 128, BF16_KV, "llama-3-8b-w4a16")
BF16 = Weights("bf16, kv bf16", {"quantization": "none"}, "bf16", 2.0, BF16_KV)
PLAIN = replace(
    FP8,
    name="w8a8-fp8, kv fp8, neither drafts nor shared prefixes",
    settings={**FP8.settings, "speculation": Speculation("off"), "prefix_sharing": False},
)
KINDS = (FP8, FOUR, BF16)
SMALL = replace(BF16, name="852M, bf16, kv bf16", shape="llama-852m")


def run_fp8(session: Session) -> None:
    """What the engine is for: 8-bit weights, activations and cache."""
    _run(session, FP8, ("256 ragged rows", "1,024 ragged rows", "template", "phrases"), (1, 64, 256))


def run_four_bits(session: Session) -> None:
    """Weights in 4 bits, in groups of 128."""
    _run(session, FOUR, ("256 ragged rows", "1,024 ragged rows"), (1, 16))


def run_bf16(session: Session) -> None:
    """Nothing quantized."""
    _run(session, BF16, ("256 ragged rows", "1,024 ragged rows"), (64,))


def run_plain(session: Session) -> None:
    """What drafts and shared prefixes are worth: without them."""
    _run(session, PLAIN, ("template", "phrases"), ())


def run_small_model(session: Session) -> None:
    """A model whose steps are so short that the host's work shows."""
    _run(session, SMALL, (), (1, 64, 256))


def run_small_card(session: Session) -> None:
    """The 8B model in 16 bits, the process held to 24 GB."""
    share = 1.0
    if not session.smoke:
        share = min(1.0, SMALL_CARD / torch.cuda.get_device_properties(0).total_memory)
        torch.cuda.set_per_process_memory_fraction(share)
    with _model(session, BF16) as model:
        engine = engine_of(
            session, model, random_weights=True, gpu_memory_utilization=0.9 * share, kv_cache_tokens=1 << 20,
            **_sizes(session, BF16, 1280, 1024),
        )  # fmt: skip
        vocab = read_model_config(model).vocab_size
        ran = drive(session, engine, requests_of(random_prompts(session.pick(64, 2), 100, vocab), 8), session.left)
        session.row("A card of 24 GB", rows=ran.rows, **{"kv, GB": engine.runner.kv_cache_bytes / 1e9})
        assert not ran.cut and ran.rows == session.pick(64, 2), f"{ran.rows} rows were done"


def run_first_calls(session: Session) -> None:
    """Steps of one layer, so that the kernels are compiled that the whole models call: a few cases in each process."""
    which, _ = session.share
    jobs = session.pick(JOBS, SMOKE)
    weights = (*KINDS, *KINDS, SMALL)[which]
    chosen = ([jobs["phrases"]], [jobs["1,024 ragged rows"], jobs["template"]], [])[which // len(KINDS)]
    if session.smoke and which not in (0, len(KINDS)):
        session.findings.note(f"{session.name}: one engine of a kind is enough for a smoke test")
        return
    with _model(session, weights, shallow=True) as model:
        engine = load(session, model, weights, chosen, session.pick(256, 2))
        vocab = engine.runner.decoder.config.vocab_size
        for job in session.within_time(chosen):
            drive(session, engine, job.requests(vocab), session.left)
        for rows in session.within_time(session.pick((64, 16), (2,))):
            drive(session, engine, requests_of(random_prompts(rows, 40, vocab), session.pick(12, 2)), session.left)
        session.row("First calls of engines", weights=weights.name, programs=compiled_programs(session))


def _shallow(model: Path, folder: Path) -> Path:
    """The same shape with one layer."""
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 1}
    shallow = folder / "shallow"
    shallow.mkdir()
    (shallow / "config.json").write_text(json.dumps(config))
    return shallow


def _run(session: Session, weights: Weights, names: tuple[str, ...], watched: tuple[int, ...]) -> None:
    """The jobs of these names; `watched` are rows of steady steps."""
    watch_graphs(session)
    jobs = [session.pick(JOBS, SMOKE)[name] for name in names]
    ceiling = ceilings.known(session)
    with _model(session, weights) as model:
        engine = load(session, model, weights, jobs, max(session.pick(watched, (2,)), default=0))
        session.say(f"loaded, {engine.runner.kv_cache_bytes / 1e9:.1f} GB of keys and values")
        config = read_model_config(model)
        for job in session.within_time(jobs):
            with session.case(f"{weights.name}, {job.name}"):
                seconds = min(job.seconds, max(session.left - LAST_SECONDS, 1.0))
                ran = drive(session, engine, job.requests(config.vocab_size), seconds)
                _report(session, engine, config, weights, job, ran, ceiling)
        for rows in session.within_time(session.pick(watched, (2,))):
            with session.case(f"{weights.name}, steady steps of {rows} rows"):
                report_steady(session, engine, weights.name, rows, config.vocab_size)
        # Not `stats()`, which would measure the device's peak first.
        for note in engine._stats.notes:
            session.findings.note(f"{weights.name}: {note}")


@contextmanager
def _model(session: Session, weights: Weights, shallow: bool = False) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        model = shape_of(session, SHAPES / weights.shape, Path(folder))
        yield _shallow(model, Path(folder)) if shallow else model
    release(session)


def _sizes(session: Session, weights: Weights, longest: int, rows: int) -> dict[str, Any]:
    found = {"max_num_batched_tokens": session.pick(8192, 64), "max_model_len": longest, "max_num_seqs": rows}
    found |= weights.settings
    return {**found, "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8} if session.smoke else found


def load(session: Session, model: Path, weights: Weights, jobs: list[Job], watched: int = 0) -> Engine:
    """Load a warm engine, with room for the largest of the jobs and for `watched` rows."""
    longest = max((job.longest for job in jobs), default=1280)
    rows = max([*(job.rows for job in jobs), watched])
    tokens = max([*(job.tokens for job in jobs), watched * 1024])
    engine = engine_of(
        session, model, random_weights=True, kv_cache_tokens=tokens, gpu_memory_utilization=0.9,
        **_sizes(session, weights, longest, rows),
    )  # fmt: skip
    vocab = engine.runner.decoder.config.vocab_size
    for count in session.pick((1, 37, rows), (2,)):
        prompts = random_prompts(count, session.pick(33, 5), vocab, seed=1)
        drive(session, engine, requests_of(prompts, session.pick(12, 2), temperature=1.0), 10.0)
    return engine


def _report(
    session: Session, engine: Engine, config: ModelConfig, weights: Weights, job: Job, ran: Ran, ceiling: Ceilings
) -> None:
    model = CostModel.of(config, weights.kv_bytes)
    device = Device(ceiling.of(weights.unit), ceiling.bytes_per_second)
    roofline = Roofline(model, _weight_bytes(model, weights), device)
    # What an average row has done is what it is held to: a run may have been cut.
    requests = Requests(max(1, ran.prompt_tokens // job.rows), max(1, ran.new_tokens // job.rows))
    bound, serial = (
        job.rows * seconds(requests, max(ran.largest_batch, 1))
        for seconds in (roofline.bound_seconds, roofline.serial_seconds)
    )
    shared = engine.scheduler.admission.shared_tokens
    session.row(
        TITLE,
        weights=weights.name,
        job=job.name,
        rows=job.rows,
        done=ran.rows,
        seconds=ran.seconds,
        **{"tokens/s": ran.total_rate, "new tokens/s": ran.new_rate},
        **{"of the serial roofline, %": 100 * serial / ran.seconds, "of the bound, %": 100 * bound / ran.seconds},
        **{"largest batch": ran.largest_batch, "steps": ran.steps, "decoding": ran.decoding, "replayed": ran.replays},
        **{"of decoding replayed, %": 100 * ran.replays / max(ran.decoding, 1), "compiled meanwhile": ran.compiled},
        **{"drafts": ran.drafted, "accepted": ran.accepted, "prompt tokens shared so far": shared},
        **{"kv, GB": engine.runner.kv_cache_bytes / 1e9, "cut": ran.cut},
    )
    session.say(f"{weights.name}, {job.name}: {ran.total_rate:,.0f} tokens/s, cut: {ran.cut}")


def _weight_bytes(model: CostModel, weights: Weights) -> float:
    """Of an element on average: the head stays in 16 bits."""
    whole = model.linear_parameters + model.head_parameters
    return (model.linear_parameters * weights.weight_bytes + model.head_parameters * 2.0) / whole
