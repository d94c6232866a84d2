"""transformers' continuous batching in bfloat16 beside this engine: one shape, the same prompts, in the same run."""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from gpu_check import end_to_end
from gpu_check.engines import SMALLER, drive, random_prompts, release, requests_of, shape_of
from gpu_check.jobs import Job
from gpu_check.session import SHAPES, Session

TITLE = "The same prompts through both"
SHAPE = SHAPES / "llama-3-8b"
AIM = 5.0
"""How many times as fast 8-bit weights are to be."""
PROMPT, NEW = 128, 128
PROBED, MOST = 16, 256
THEIR_SECONDS = 75.0
"""That their run may take, by what a small one took."""
Prompts = list[list[int]]
Generate = Callable[[Prompts, int], int]
"""Prompts and new tokens of each to all new tokens."""


def run_theirs(session: Session) -> None:
    """As many rows as fit the time; by `generate` on one static batch if `generate_batch` does not work here."""
    import transformers

    model = _model(session)
    session.say(f"transformers {transformers.__version__} has its model")
    ways: dict[str, tuple[Generate, Callable[[], str]]] = {
        "generate_batch": _continuous(session, model),
        "generate, one static batch": (lambda prompts, new: _static(model, prompts, new), lambda: _attention(model)),
    }
    for way, (generate, how) in ways.items():
        before = len(session.findings.faults)
        with session.case(f"transformers, {way}"):
            _time(session, way, generate, how)
        if len(session.findings.faults) == before:
            return
        release(session)


def _time(session: Session, way: str, generate: Generate, how: Callable[[], str]) -> None:
    vocab = session.pick(128256, 320)
    prompt, new = session.pick((PROMPT, NEW), (6, 3))
    probed = random_prompts(session.pick(PROBED, 2), prompt, vocab)
    generate(probed, 2)  # warm
    session.synchronize()
    began = time.perf_counter()
    generate(probed, max(new // 4, 2))
    session.synchronize()
    whole = 4 * (time.perf_counter() - began)  # of so few rows, all new tokens
    # More rows take longer in proportion at the worst.
    fitting = int(PROBED * min(THEIR_SECONDS, session.left / 2) / whole)
    rows = max(PROBED, min(MOST, 1 << max(fitting, 1).bit_length() - 1)) if not session.smoke else 2
    session.say(f"{way}: {len(probed)} rows would take {whole:.1f} s; {rows} rows")
    prompts = random_prompts(rows, prompt, vocab)
    generate(prompts, 2)
    session.synchronize()
    began = time.perf_counter()
    made = generate(prompts, new)
    session.synchronize()
    took = time.perf_counter() - began
    assert made == rows * new, f"{made} new tokens instead of {rows * new}"
    _row(session, f"transformers, {way}, {how()}", "bf16, kv bf16", rows, prompt, new, took)


def _row(session: Session, engine: str, weights: str, rows: int, prompt: int, new: int, took: float) -> float:
    rate = rows * (prompt + new) / took
    sizes = {"rows": rows, "in": prompt, "out": new}
    rates = {"seconds": took, "tokens/s": rate, "new tokens/s": rows * new / took}
    session.row(TITLE, engine=engine, weights=weights, **sizes, **rates)
    session.say(f"{engine}, {weights}: {rate:,.0f} tokens/s")
    return rate


def _model(session: Session) -> Any:
    """The same shape, random weights, made on the device."""
    import transformers

    config = json.loads((SHAPE / "config.json").read_text()) | (SMALLER if session.smoke else {})
    for key in ("architectures", "torch_dtype", "rope_scaling", "pretraining_tp", "eos_token_id", "bos_token_id"):
        config.pop(key, None)
    shaped = transformers.AutoConfig.for_model(config.pop("model_type"), **config, eos_token_id=None)
    with torch.device(session.device):
        model = transformers.AutoModelForCausalLM.from_config(shaped, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    return model.eval().to(session.device)


def _continuous(session: Session, model: Any) -> tuple[Generate, Callable[[], str]]:
    """Its manager is kept from call to call, so that graphs and memory are there when it is timed."""
    from transformers import GenerationConfig

    def generate(prompts: Prompts, new: int) -> int:
        settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        if _rows_of(model) != len(prompts):  # a manager is made for a number of rows
            _forget(model)
        out = model.generate_batch(
            inputs=prompts,
            generation_config=settings,
            max_new_tokens=new,
            persistent_manager=True,
            progress_bar=False,
            **_settings(session),
        )
        model.gpu_check_rows = len(prompts)
        if errors := {str(result.error) for result in out.values() if result.error}:
            raise RuntimeError(f"generate_batch failed: {'; '.join(sorted(errors))[:300]}")
        return sum(len(result.generated_tokens) for result in out.values())

    return generate, lambda: _attention(model)


def _settings(session: Session) -> dict[str, Any]:
    """Their own choice of everything, but for attention kernels from the hub, which is out of reach."""
    try:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
    except ImportError:
        return {}
    known = {field.name for field in fields(ContinuousBatchingConfig)}
    wanted: dict[str, Any] = {"auto_switch_to_flash": False}
    if session.smoke:
        pages = "page_size" if "page_size" in known else "block_size"
        wanted |= {"num_blocks": 16, "max_batch_tokens": 64, pages: 32}
    chosen = {name: value for name, value in wanted.items() if name in known}
    return {"continuous_batching_config": ContinuousBatchingConfig(**chosen)} if chosen else {}


def _rows_of(model: Any) -> int:
    return int(getattr(model, "gpu_check_rows", 0))


def _forget(model: Any) -> None:
    if hasattr(model, "destroy_cached_continuous_batching_manager"):
        model.destroy_cached_continuous_batching_manager()


def _attention(model: Any) -> str:
    return f"attention {model.config._attn_implementation}"


@torch.no_grad()
def _static(model: Any, prompts: Prompts, new: int) -> int:
    """Prompts are of one length."""
    _forget(model)
    if hasattr(model, "set_attn_implementation"):  # continuous batching may have changed it
        model.set_attn_implementation("sdpa")
    ids = torch.tensor(prompts, device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)
    return int(out.shape[0] * (out.shape[1] - ids.shape[1]))


def run_ours(session: Session) -> None:
    """The prompts that transformers had."""
    theirs = session.rows(TITLE)
    rows = theirs[-1]["rows"] if theirs else session.pick(MOST, 2)
    prompt, new = session.pick((PROMPT, NEW), (6, 3))
    for weights in session.within_time((end_to_end.FP8, end_to_end.BF16)):
        with session.case(f"batchinfer, {weights.name}"), tempfile.TemporaryDirectory() as folder:
            model = shape_of(session, SHAPE, Path(folder))
            engine = end_to_end.load(session, model, weights, [Job("", rows, (prompt, prompt), (new, new), 60.0)])
            vocab = engine.runner.decoder.config.vocab_size
            ran = drive(session, engine, requests_of(random_prompts(rows, prompt, vocab), new), 60.0)
            del engine
            assert not ran.cut and ran.rows == rows, f"{ran.rows} of {rows} rows were done"
            rate = _row(session, "batchinfer", weights.name, rows, prompt, new, ran.seconds)
            if theirs:
                ratio = rate / theirs[-1]["tokens/s"]
                session.row(
                    "Times as fast as transformers", weights=weights.name, beside=theirs[-1]["engine"], ratio=ratio
                )
                if weights is end_to_end.FP8:
                    aim = f"{AIM:.0f} times as fast as {theirs[-1]['engine']}, with {weights.name}"
                    session.findings.aim(aim, f"{ratio:.1f} times", ratio >= AIM)
        release(session)
