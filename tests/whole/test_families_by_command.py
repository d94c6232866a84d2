"""One model of each kind, by the command line: the answers are those of transformers, however a job is run.

Each model is run once as it comes. Then the same table is run in two shards, side by side: the first with drafts and
small chunks of prompts, the second without drafts and in large chunks, killed when it has committed rows, and begun
again. Merged, they are the same bytes.

With `EVERY_FAMILY` in the environment it is one model of each family, which takes half an hour or more.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
import transformers
from families import QUICK, made
from gguf_texts import TEXTS
from tokenizers import decoders, models, pre_tokenizers, trainers

from batchinfer.models.config import read_model_config
from batchinfer.models.feed_forward import Experts

pytestmark = pytest.mark.long(minutes=2)

ROWS, NEW = 24, 16
KINDS = ["qwen3_moe", "qwen3_5_text", "lfm2", "gpt_oss", "gemma4_text"]
CASES = QUICK if "EVERY_FAMILY" in os.environ else KINDS
STEM = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
DRAFTS = '{"method": "ngram", "gate": false, "prompt_lookup_min": 1}'
SMALL_CHUNKS = ["--max-num-batched-tokens", "64", "--speculative-config", DRAFTS]
LARGE_CHUNKS = ["--max-num-batched-tokens", "1024", "--speculative-config", "off", "--max-num-seqs", "5"]


def prompts() -> list[str]:
    """Some begin alike, over more than a tile."""
    return [f"{STEM * (i % 3)}{i} " + TEXTS[i % len(TEXTS)][:60] for i in range(ROWS)]


def save_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """A tokenizer with the 320 tokens of the models."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|bos|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, STEM] * 3, trainer)
    assert tokenizer.get_vocab_size() == 320
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def start(folder: Path, output: str, *flags: str) -> subprocess.Popen[bytes]:
    """Begin a job in a process group of its own."""
    command = [sys.executable, "-P", "-m", "batchinfer", "run", "in.parquet", "-o", output, "--model", "model"]
    command += ["--max-tokens", str(NEW), "--temperature", "0", "--commit-rows", "3", *flags]
    with (folder / f"{output}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def ended(job: subprocess.Popen[bytes], folder: Path, output: str) -> None:
    assert job.wait(timeout=300) == 0, (folder / f"{output}.log").read_text()


def answers(path: Path) -> bytes:
    """The columns of answers, as bytes."""
    table = pq.read_table(path, columns=["generated_text", "finish_reason", "prompt_tokens", "completion_tokens"])
    return json.dumps(table.to_pydict()).encode()


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_transformers_however_the_job_is_run(
    make_model: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    shutil.copytree(made(make_model, case), tmp_path / "model")
    tokenizer = save_tokenizer(tmp_path / "model")
    pq.write_table(pa.table({"prompt": prompts()}), tmp_path / "in.parquet")

    ended(start(tmp_path, "whole.parquet"), tmp_path, "whole.parquet")
    whole = pq.read_table(tmp_path / "whole.parquet")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    for i, prompt in enumerate(prompts()):
        ids = tokenizer.encode(prompt).ids
        with torch.no_grad():
            found = oracle.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(found[0, len(ids) :].tolist())
        assert whole["generated_text"][i].as_py() == text, f"row {i}"
    report = json.loads((tmp_path / "whole.run" / "report.json").read_text())
    assert report["prompt_tokens_shared"] > 0
    layers = read_model_config(tmp_path / "model").layers
    assert (report["experts_touched"] > 1) == any(isinstance(layer.feed_forward, Experts) for layer in layers)

    names = [f"out-{i}-of-2.parquet" for i in range(2)]
    first = start(tmp_path, "out.parquet", "--shard", "0/2", *SMALL_CHUNKS)
    second = start(tmp_path, "out.parquet", "--shard", "1/2", *LARGE_CHUNKS)
    parts = (tmp_path / names[1]).with_suffix(".run") / "parts"
    while second.poll() is None and not list(parts.glob("part-*")):
        time.sleep(0.005)
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    assert not (tmp_path / names[1]).exists(), "the job was to be killed before its end"
    ended(start(tmp_path, "out.parquet", "--shard", "1/2", *LARGE_CHUNKS), tmp_path, "out.parquet")
    ended(first, tmp_path, "out.parquet")
    drafting, resumed = (
        json.loads(((tmp_path / name).with_suffix(".run") / "report.json").read_text()) for name in names
    )
    assert drafting["drafted"] > 50 and resumed["rows_resumed"] > 0 and resumed["rows_computed"] > 0

    merge = [sys.executable, "-P", "-m", "batchinfer", "merge", *names, "-o", "all.parquet"]
    subprocess.run(merge, cwd=tmp_path, check=True, capture_output=True)
    assert answers(tmp_path / "all.parquet") == answers(tmp_path / "whole.parquet")
