"""Engines on shapes of models, and runs of them: to the end, or until a time is over."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compile_check.programs import kernels
from gpu_check.session import Session

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.engine import Engine
from batchinfer.engine.own_engine import own_engine
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.transfer import Sampled
from batchinfer.models.batch import Batch
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
    return own_engine(config, Numbers(vocab))


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
    decoding: int  # steps without prompt tokens
    replays: int
    drafted: int
    accepted: int
    compiled: int  # kernels that were compiled meanwhile
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
    table, stats = engine.table, engine._stats
    before = (engine.runner.steps.replays, stats.drafted, stats.accepted, compiled_programs(session))
    prompt_tokens = new_tokens = rows = largest = 0
    lengths = np.diff(requests.offsets)
    session.synchronize()
    began = time.perf_counter()
    with _launched(engine) as launched:
        engine.add(requests)
        while engine.unfinished and time.perf_counter() - began < seconds:
            done = engine.step()
            largest = max(largest, int(table.active.sum()))
            rows += len(done)
            new_tokens += len(done.token_ids)
            prompt_tokens += int(lengths[np.isin(requests.rows, done.rows)].sum()) if len(done) else 0
        session.synchronize()
    took = time.perf_counter() - began
    cut = engine.unfinished > 0
    running = np.flatnonzero(table.active)
    prompt_tokens += int(np.minimum(table.computed, table.prompt_length)[running].sum())
    new_tokens += int((table.length - table.prompt_length)[running].sum())
    drop(session, engine)
    after = (engine.runner.steps.replays, stats.drafted, stats.accepted, compiled_programs(session))
    counts = (new - old for new, old in zip(after, before, strict=True))
    return Ran(took, prompt_tokens, new_tokens, rows, largest, len(launched), launched.count(0), *counts, cut)


@contextmanager
def _launched(engine: Engine) -> Iterator[list[int]]:
    """Prompt tokens of each step that is launched."""
    found: list[int] = []
    launch = engine.runner.launch

    def counted(batch: Batch) -> Sampled:
        found.append(batch.prompt_tokens)
        return launch(batch)

    engine.runner.launch = counted
    try:
        yield found
    finally:
        del engine.runner.launch


def compiled_programs(session: Session) -> int:
    """Programs of our kernels that this process has compiled or loaded so far."""
    if session.smoke:
        return 0
    device = torch.cuda.current_device()
    return sum(len(kernel.device_caches[device][0]) for kernel in {shipped.kernel for shipped in kernels(session.gpu)})


def drop(session: Session, engine: Engine) -> None:
    """Forget all rows that wait or run."""
    session.synchronize()
    engine.drop()


def release(session: Session) -> None:
    """Give memory back that nobody refers to any more."""
    import gc

    gc.collect()
    if not session.smoke:
        torch.cuda.empty_cache()
