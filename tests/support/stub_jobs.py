"""Jobs with an engine that computes nothing: what they are made of, for tests of the job layer."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.jobs.report import Report
from batchinfer.jobs.rows.windows import Limits, Windows
from batchinfer.jobs.spec import JobSpec

STUB = "batchinfer.jobs.process.stub_engine:StubEngine"
CONTEXT = 64
# The least of a config.json that a job accepts, but for vocab_size.
SHAPE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1,
    "max_position_embeddings": CONTEXT,
}  # fmt: skip

# Engines that misbehave, as a module that the child imports by name. `Slow` ends a few rows a step.
ENGINES = """
import os, signal, time
import numpy as np
from batchinfer.jobs.process.stub_engine import StubEngine
from batchinfer.engine.request import Completions, FinishReason, RowError

class Slow(StubEngine):
    SECONDS = 0.02

    def add(self, requests):
        for first in range(0, len(requests), 4):
            super().add(requests.take(np.arange(first, min(first + 4, len(requests)))))

    def step(self):
        time.sleep(self.SECONDS)
        return super().step()

    def take_admitted(self):
        return self._waiting[0].rows.tolist() if self._waiting else []

class Dies(Slow):
    def step(self):
        if self._stats.steps == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step()

class Raises(Slow):
    def step(self):
        if self._stats.steps == 3:
            raise RuntimeError("a bug\\nin two lines")
        return super().step()

class Poisoned(Slow):
    # Rows 13 and 30 are the end of it, each time.
    def step(self):
        if {13, 30} & set(self._waiting[0].rows.tolist()):
            self.end()
        return super().step()

    def end(self):
        os.kill(os.getpid(), signal.SIGBUS)

class Hangs(Poisoned):
    def end(self):
        time.sleep(1000)

class Faults(Poisoned):
    def end(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

class Hopeless(Slow):
    def step(self):
        os.kill(os.getpid(), signal.SIGSEGV)

class Measures(StubEngine):
    # It measures the device once all rows are done.
    def stats(self):
        if self._stats.steps and not self.unfinished:
            time.sleep(0.5)
        return super().stats()

class Forgets(Slow):
    unfinished = 0

class Fails(StubEngine):
    def step(self):
        done = super().step()
        done.finish_reasons[done.rows % 2 == 1] = FinishReason.ERROR
        errors = {int(row): RowError("not_finite", f"row {row}") for row in done.rows if row % 2 == 1}
        return Completions(done.rows, done.token_ids, done.offsets, done.finish_reasons, errors)

def refuse(config, tokenizer):
    raise ValueError(f"model {config.model}: tensor x is missing")

def load_for_a_minute(config, tokenizer):
    time.sleep(60)

def break_down(config, tokenizer):
    raise KeyError("x")

class Remembers(StubEngine):
    def __init__(self, config, tokenizer):
        super().__init__(config, tokenizer)
        self._stats.notes = [f"{config.kv_cache_tokens} tokens of KV"]
"""

SCRIPT = """
import sys
from functools import partial
from batchinfer.jobs.cli.main import main
from batchinfer.jobs import job
from batchinfer.jobs.job import run

if __name__ == "__main__":
    sys.path.insert(0, sys.argv.pop(1))
    job.run = partial(run, engine="engines_of_the_test:Slow")
    main()
"""


def make_model(folder: Path, **shape: Any) -> Path:
    """What the job layer needs of a model: a tokenizer and config.json, no weights. A plan needs a `shape` too."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["def count(words):"], trainer)
    made.save(str(folder / "tokenizer.json"))
    config = {**SHAPE, **shape, "eos_token_id": 0, "vocab_size": made.get_vocab_size()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_json_lines(path: Path, *values: Any) -> Path:
    """A JSONL file of these values."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=100)
    return path


def prompts(n: int) -> list[str]:
    return [f"prompt {i} " + "x" * (i % 7) for i in range(n)]


def spec(model: Path, *inputs: Path, **fields: Any) -> JobSpec:
    defaults = {
        "output": inputs[0].parent / "out.parquet",
        "prompt_column": "prompt",
        "sampling": SamplingParams(max_tokens=8),
    }
    return JobSpec(inputs=inputs, model=str(model), **{**defaults, **fields})


def limit(monkeypatch: pytest.MonkeyPatch, limits: Limits) -> None:
    """Jobs with smaller windows, pieces and slices."""
    monkeypatch.setattr("batchinfer.jobs.job.Windows", partial(Windows, limits=limits))


def expected(model: Path, texts: list[str], limit: int = 8) -> list[str]:
    plain = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    return [plain.decode(plain.encode(text).ids[:limit]) for text in texts]


def recount(output: Path) -> dict[str, Any]:
    table = pq.read_table(output)
    failed = pc.sum(pc.equal(table["finish_reason"], "error")).as_py() or 0
    codes = table["error_code"].drop_null().value_counts().to_pylist()
    return {
        "rows": table.num_rows,
        "rows_ok": table.num_rows - failed,
        "rows_failed": failed,
        "rows_by_error": {entry["values"]: entry["counts"] for entry in codes},
        "prompt_tokens": pc.sum(table["prompt_tokens"]).as_py() or 0,
        "completion_tokens": pc.sum(table["completion_tokens"]).as_py() or 0,
    }


def counts(report: Report) -> dict[str, Any]:
    names = ("rows", "rows_ok", "rows_failed", "rows_by_error", "prompt_tokens", "completion_tokens")
    return {name: getattr(report, name) for name in names}
