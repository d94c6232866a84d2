"""Engines on shapes of models, and runs of them: to the end, or until a time is over."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_check.session import Session

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.engine import Engine
from batchinfer.engine.request import Requests, SamplingParams
from batchinfer.text.tokenizer import Tokenizer

SMALLER = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}
"""A shape for smoke tests, as far as it differs."""


class Numbers(Tokenizer):
    """Token ids alone; none of them ends a text."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.eos_ids = vocab_size, ()


def shape_of(session: Session, shape: Path, folder: Path) -> Path:
    """A model's folder with nothing but its config.json: itself, or in a smoke test a small one of the same kind."""
    if not session.smoke:
        return shape
    config = {**json.loads((shape / "config.json").read_text()), **SMALLER}
    small = folder / shape.name
    small.mkdir(exist_ok=True)
    (small / "config.json").write_text(json.dumps(config))
    return small


def engine_of(session: Session, model: Path, **settings: Any) -> Engine:
    """On the session's device."""
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    config = EngineConfig(model, device=session.device.type, **settings)
    return Engine(config, Numbers(vocab))


def random_prompts(count: int, length: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of `length` tokens."""
    found: list[list[int]] = np.random.default_rng(seed).integers(2, vocab, (count, length)).tolist()
    return found


def requests_of(prompts: Sequence[Sequence[int]], new: int, **params: Any) -> Requests:
    """So many new tokens of each, whatever they are."""
    return Requests.of(prompts, SamplingParams(max_tokens=new, ignore_eos=True, **params), seeds=range(len(prompts)))


def tokens_of(engine: Engine, requests: Requests) -> dict[int, list[int]]:
    """The new tokens of each row."""
    found: dict[int, list[int]] = {}
    for completions in engine.generate(requests):
        for i, row in enumerate(completions.rows.tolist()):
            found[row] = completions.tokens_of(i)
    return found


@dataclass(frozen=True)
class Ran:
    """What an engine did, and how long it took."""

    seconds: float
    prompt_tokens: int
    new_tokens: int
    rows: int  # that came to their end
    largest_batch: int  # of rows side by side
    steps: int
    replays: int
    cut: bool  # whether the time was over before all was done

    @property
    def total_rate(self) -> float:
        """Prompt and new tokens a second."""
        return (self.prompt_tokens + self.new_tokens) / self.seconds

    @property
    def new_rate(self) -> float:
        """New tokens a second."""
        return self.new_tokens / self.seconds


def drive(session: Session, engine: Engine, requests: Requests, seconds: float) -> Ran:
    """Run requests to their end, or for so many seconds; what is then under way is dropped, and counted so far."""
    table, replays = engine.table, engine.runner.steps.replays
    prompt_tokens = new_tokens = rows = largest = steps = 0
    session.synchronize()
    began = time.perf_counter()
    engine.add(requests)
    while engine.unfinished and time.perf_counter() - began < seconds:
        done = engine.step()
        steps += 1
        largest = max(largest, int(table.active.sum()))
        rows += len(done)
        new_tokens += len(done.token_ids)
        lengths = np.diff(requests.offsets)
        prompt_tokens += int(lengths[np.isin(requests.rows, done.rows)].sum()) if len(done) else 0
    session.synchronize()
    took = time.perf_counter() - began
    cut = engine.unfinished > 0
    running = np.flatnonzero(table.active)
    prompt_tokens += int(np.minimum(table.computed, table.prompt_length)[running].sum())
    new_tokens += int((table.length - table.prompt_length)[running].sum())
    drop(session, engine)
    return Ran(took, prompt_tokens, new_tokens, rows, largest, steps, engine.runner.steps.replays - replays, cut)


def drop(session: Session, engine: Engine) -> None:
    """Forget all rows that wait or run."""
    session.synchronize()
    engine.steps.clear()
    scheduler = engine.scheduler
    scheduler.prefilling = []
    admission = scheduler.admission
    admission._waiting.clear()
    admission._preempted.clear()
    admission.waiting_rows, admission.admitted = 0, []
    # As if a last row came and went that shares all there is to share: nobody wants it any more.
    tree = admission._tree
    admission.wiped.append(tree.leave(tree.enter(len(tree._path), 0)))
    for place in np.flatnonzero(engine.table.active).tolist():
        scheduler.finish(place)


def release(session: Session) -> None:
    """Give memory back that nobody refers to any more."""
    import gc

    gc.collect()
    if not session.smoke:
        torch.cuda.empty_cache()
