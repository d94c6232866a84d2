"""The jobs that offline runs are measured on: tables of token ids, with the new tokens that each row gets."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.engine.config import Speculation
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.jobs.bench import TOKEN_IDS
from batchinfer.text.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "demo" / "prompts.parquet"
TARGET = REPOSITORY / "examples" / "stdlib" / "target"
DRAFT = REPOSITORY / "examples" / "stdlib" / "draft"
SHAPE = REPOSITORY / "benchmarks" / "shapes" / "llama-852m"
STOP = ("\ndef ", "\nasync def ", "\nclass ", "\n@", "\n\n\n")  # of the demo job

Rows = list[tuple[list[int], int]]
"""Prompts, and new tokens at most."""


@dataclass(frozen=True)
class Workload:
    """Rows for one model. `sampling` is of all rows but for their new tokens."""

    name: str
    about: str
    rows: Callable[["Text"], Rows]
    sampling: dict[str, Any] = field(default_factory=lambda: {"ignore_eos": True})
    max_num_seqs: int = 64
    kv_cache_memory_bytes: int | None = None


def fixed_drafters(draft: Path | None) -> dict[str, Speculation]:
    """Each drafter at every step; a draft model where there is one."""
    found = {"n-grams": Speculation("ngram", gate=False), "suffix": Speculation("suffix", gate=False)}
    if draft is not None:
        found["draft model"] = Speculation("draft_model", 4, draft, gate=False)
    return found


class Text:
    """A long text of the demo's prompts, in token ids, that workloads cut their prompts from."""

    def __init__(self, seed: int = 0) -> None:
        tokenizer = Tokenizer.load(TARGET)
        texts = pq.read_table(DEMO)["prompt"].to_pylist()
        ids, offsets = tokenizer.encode_batch(texts, False)
        self.prompts = [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]
        self.ids = [token for prompt in self.prompts for token in prompt[1:]]
        self.rng = np.random.default_rng(seed)

    def cut(self, length: int) -> list[int]:
        """So many neighbouring tokens, from anywhere."""
        start = int(self.rng.integers(0, len(self.ids) - length))
        return self.ids[start : start + length]


def demo(text: Text) -> Rows:
    return [(prompt, 96) for prompt in text.prompts]


def template(rows: int, shared: int, own: int, new: int) -> Callable[[Text], Rows]:
    """Four templates, of `shared` tokens each, before `own` tokens of every row; one row in twenty comes twice."""

    def make(text: Text) -> Rows:
        templates = [text.cut(shared) for _ in range(4)]
        prompts = [
            templates[int(text.rng.integers(4))] + text.cut(int(own * text.rng.uniform(0.5, 1.5))) for _ in range(rows)
        ]
        for i in range(0, rows, 20):
            prompts[i] = prompts[(i + rows // 2) % rows]
        return [(prompt, new) for prompt in prompts]

    return make


def sharegpt(rows: int, most: int) -> Callable[[Text], Rows]:
    """Lognormal lengths: 246 tokens in (deviation 547), 322 out (244), no more than the context holds."""

    def lengths(text: Text, mean: float, deviation: float) -> np.ndarray[Any, np.dtype[np.int64]]:
        variance = np.log(1 + deviation**2 / mean**2)
        drawn = text.rng.lognormal(np.log(mean) - variance / 2, variance**0.5, rows)
        return np.clip(drawn, 4, most // 2 - 8).astype(np.int64)

    def make(text: Text) -> Rows:
        pairs = zip(lengths(text, 246, 547).tolist(), lengths(text, 322, 244).tolist(), strict=True)
        return [(text.cut(before), after) for before, after in pairs]

    return make


def tail(rows: int, new: int) -> Callable[[Text], Rows]:
    """Few rows, and long outputs."""
    return lambda text: [(prompt[:200], new) for prompt in text.prompts[7 :: len(text.prompts) // rows][:rows]]


DEMO_MODEL = (
    Workload("demo", "the demo job", demo, {"temperature": 0.7, "top_p": 0.8, "stop": STOP}),
    Workload("template", "256 rows, 60 % of the prompt tokens of 4 templates", template(256, 384, 256, 48)),
    Workload("sharegpt", "128 rows of ShareGPT's lengths", sharegpt(128, 1152)),
    Workload(
        "tight",
        "256 rows of the demo that may have 384 new tokens and need few; keys and values of 8,192 tokens",
        lambda text: [(prompt[-768:], 384) for prompt in text.prompts[:256]],
        {"temperature": 0.7, "top_p": 0.8, "stop": STOP},
        kv_cache_memory_bytes=8192 * 6 * 2 * 2 * 64 * 4,
    ),
    Workload("tail", "8 rows, 512 new tokens each, greedy", tail(8, 512)),
    Workload(
        "tail sampled",
        "the same at temperature 0.7, top-p 0.8",
        tail(8, 512),
        {"temperature": 0.7, "top_p": 0.8, "ignore_eos": True},
    ),
)
LARGE_SHAPE = (
    Workload("template", "32 rows, 60 % of the prompt tokens of 4 templates", template(32, 384, 256, 24)),
    Workload("sharegpt", "24 rows of ShareGPT's lengths, at most 256", sharegpt(24, 512)),
    Workload("tail", "4 rows, 96 new tokens each, greedy", tail(4, 96)),
)


def write_jsonl(rows: Rows, path: Path) -> None:
    """The same rows for other engines' runners: a line has `prompt_token_ids` and `max_tokens`."""
    path.write_text("".join(json.dumps({TOKEN_IDS: p, "max_tokens": new}) + "\n" for p, new in rows))


def write_rows(rows: Rows, path: Path) -> None:
    """A table for `batchinfer.jobs.bench.TokenIdPrompts`."""
    columns = {
        "id": pa.array(range(len(rows)), pa.int64()),
        TOKEN_IDS: pa.array([prompt for prompt, _ in rows], pa.list_(pa.int32())),
        "max_tokens": pa.array([new for _, new in rows], pa.int32()),
    }
    pq.write_table(pa.table(columns), path)


def sampling_of(workload: Workload) -> SamplingParams:
    """Of its rows, but for their new tokens."""
    return SamplingParams(**workload.sampling)
