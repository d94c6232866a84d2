"""The demo: a held-out split that never moves, prompts as promised, the shipped models, and the job itself."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tomllib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from repository import STDLIB
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.engine import Engine
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.text.tokenizer import Tokenizer

JOB = STDLIB / "job.toml"


def script(name: str) -> ModuleType:
    """A script of the example as a module."""
    spec = importlib.util.spec_from_file_location(name, STDLIB / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_prompts(output: Path, hash_seed: str) -> pa.Table:
    command = [sys.executable, str(STDLIB / "prompts.py"), "-o", str(output)]
    subprocess.run(command, cwd=output.parent, env=os.environ | {"PYTHONHASHSEED": hash_seed}, check=True)
    return pq.read_table(output)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return make_prompts(tmp_path_factory.mktemp("prompts") / "prompts.parquet", "1")


@pytest.fixture(scope="module")
def lengths(table: pa.Table) -> list[int]:
    """Tokens of each prompt, counted by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(STDLIB / "target")
    return [len(ids) for ids in tokenizer(table["prompt"].to_pylist())["input_ids"]]


def test_split_depends_on_the_name_alone() -> None:
    corpus = script("corpus")
    names = ["tarfile", "mailbox", "enum", "json.decoder", "random", "traceback", "os"]
    assert [n for n in names if corpus.Module(n, "").held_out] == ["tarfile", "mailbox", "enum", "traceback"]


def test_columns(table: pa.Table) -> None:
    assert table.schema.names == ["id", "prompt", "module", "reference"]
    assert table.num_rows >= 512
    assert all(column.type == pa.string() and column.null_count == 0 for column in table.columns)
    assert len(set(table["id"].to_pylist())) == table.num_rows


def test_prompts_come_from_held_out_modules_only(table: pa.Table) -> None:
    corpus = script("corpus")
    assert all(corpus.Module(name, "").held_out for name in table["module"].unique().to_pylist())


def test_lengths_spread_over_the_whole_range(lengths: list[int]) -> None:
    assert 20 <= min(lengths) < 30
    assert 900 < max(lengths) <= 1000
    assert all(any(low <= n < low + 100 for n in lengths) for low in range(20, 920, 100))


def test_a_third_of_the_rows_shares_its_first_hundred_tokens(table: pa.Table) -> None:
    tokenizer = AutoTokenizer.from_pretrained(STDLIB / "target")
    ids = tokenizer(table["prompt"].to_pylist())["input_ids"]
    ((_, shared),) = Counter(tuple(row[:100]) for row in ids if len(row) >= 100).most_common(1)
    assert 0.30 <= shared / table.num_rows <= 0.37


def test_some_prompts_are_there_twice(table: pa.Table) -> None:
    copies = table.num_rows - len(table["prompt"].unique())
    assert 0.02 <= copies / table.num_rows <= 0.05


def test_prompt_and_reference_are_python_that_no_stop_string_cuts(table: pa.Table) -> None:
    stops = tomllib.loads(JOB.read_text())["stop"]
    for row in table.to_pylist():
        asked, written = (ast.parse(text).body[-1] for text in (row["prompt"], row["prompt"] + row["reference"]))
        assert isinstance(asked, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(asked) is not None and len(asked.body) == 1
        assert isinstance(written, type(asked)) and written.name == asked.name and len(written.body) > 1
        assert not any(stop in row["reference"] for stop in stops), row["id"]


def test_table_is_the_same_every_time(table: pa.Table, tmp_path: Path) -> None:
    assert make_prompts(tmp_path / "again.parquet", "2").equals(table)


@pytest.mark.parametrize(("name", "low", "high"), [("target", 8e6, 12e6), ("draft", 0.5e6, 1.5e6)])
def test_shipped_model_is_a_small_llama(name: str, low: float, high: float) -> None:
    config = AutoConfig.from_pretrained(STDLIB / name)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings
    with safe_open(STDLIB / name / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert low <= sum(t.numel() for t in tensors.values()) <= high


def test_both_models_read_the_same_tokens() -> None:
    target, draft = (json.loads((STDLIB / name / "tokenizer.json").read_text()) for name in ("target", "draft"))
    assert target == draft
    assert len(target["model"]["vocab"]) == 4096


def test_greedy_text_is_that_of_transformers(table: pa.Table) -> None:
    tokenizer = Tokenizer.load(STDLIB / "target")
    ids, offsets = tokenizer.encode_batch(table["prompt"].to_pylist()[::10])
    prompts = [ids[a:b].tolist() for a, b in pairwise(offsets)]
    assert len(prompts) >= 52
    engine = Engine(EngineConfig(STDLIB / "target", dtype="float32", max_model_len=1152), tokenizer)
    oracle = AutoModelForCausalLM.from_pretrained(STDLIB / "target", dtype=torch.float32).eval()
    rows = 0
    for done in engine.generate(Requests.of(prompts, SamplingParams(max_tokens=24))):
        for i, row in enumerate(done.rows.tolist()):
            new = done.tokens_of(i)
            with torch.no_grad():
                logits = oracle(torch.tensor([prompts[row] + new])).logits[0, len(prompts[row]) - 1 : -1]
            assert logits.argmax(-1).tolist() == new, f"row {row}"
            rows += 1
    assert rows == len(prompts)


def answer(prompts: Path, output: Path) -> list[dict[str, Any]]:
    """The rows of the demo's job, run over another table."""
    batchinfer = Path(sysconfig.get_path("scripts")) / "batchinfer"
    command = [str(word) for word in (batchinfer, "run", prompts, "--config", JOB, "-o", output)]
    subprocess.run(command, cwd=output.parent, check=True, timeout=600)
    rows: list[dict[str, Any]] = pq.read_table(output).to_pylist()
    return rows


def test_job_answers_in_python(table: pa.Table, tmp_path: Path) -> None:
    asked = table.take(list(range(0, table.num_rows, 10)))
    pq.write_table(asked, tmp_path / "prompts.parquet")
    rows = answer(tmp_path / "prompts.parquet", tmp_path / "answers.parquet")
    assert [row["id"] for row in rows] == asked["id"].to_pylist()
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    finished = [row["prompt"] + row["generated_text"] for row in rows if row["finish_reason"] == "stop"]
    assert len(finished) >= 16
    assert sum(map(parses, finished)) >= 0.8 * len(finished)

    report = json.loads((tmp_path / "answers.run" / "report.json").read_text())
    assert (report["rows"], report["rows_ok"], report["rows_failed"]) == (len(asked), len(asked), 0)
    show = [sys.executable, str(STDLIB / "show.py"), str(tmp_path / "answers.parquet")]
    shown = subprocess.run(show, check=True, text=True, capture_output=True).stdout
    assert str(tmp_path / "answers.run" / "report.json") in shown
    assert shown.count("\n--- ") + shown.startswith("--- ") == 4


def parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


@pytest.mark.long(minutes=2)
def test_held_out_bits_per_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(STDLIB)
    corpus, net, train = script("corpus"), script("net"), script("train")
    target = net.Net(train.CONFIGS["target"])
    with safe_open(STDLIB / "target" / "model.safetensors", "pt") as file:
        weights = {key.removeprefix("model."): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    target.load_state_dict({key: weight.float() for key, weight in weights.items()})
    tokenizer = train.Tokenizer.from_file(str(STDLIB / "target" / "tokenizer.json"))
    held_out = [module for module in corpus.modules() if module.held_out]
    assert train.bits_per_byte(target, held_out, tokenizer, "cpu") <= 1.20
