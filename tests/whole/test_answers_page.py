"""The examples of docs/answers.md run as they stand, one after the other, and print what the page says."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from batch_files import answered, lines_of, refused
from chat_models import SPECIAL, TAGS, save
from pages import EXAMPLE, run_examples
from repository import ROOT

from batchinfer.text import reasoning, tool_calls

PAGE = (ROOT / "docs" / "answers.md").read_text()
# A model that thinks unless it is told not to, and knows tools.
TEMPLATE = """{%- if tools %}{{- '<tool_call>' + tools | tojson + '</tool_call>' }}{%- endif %}
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}{%- endfor %}
{{- '<|im_start|>assistant\\n<think>\\n' }}{%- if enable_thinking is false %}{{- '\\n</think>\\n\\n' }}{%- endif %}"""


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all examples of the page have run."""
    there = tmp_path_factory.mktemp("page")
    shutil.copytree(make_model("llama", vocab_size=520, max_position_embeddings=1024), there / "model")
    save(there / "model", TEMPLATE, special=SPECIAL, tags=[*TAGS, "<tool_call>", "</tool_call>"])
    run_examples(PAGE, there)
    return there


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    assert all(row["error_code"] is None for row in found)
    return found


def test_all_blocks_of_code_are_examples() -> None:
    assert len(EXAMPLE.findall(PAGE)) == PAGE.count("```sh") + PAGE.count("```python")
    assert sum(bool(lines) for *_, lines in EXAMPLE.findall(PAGE)) == PAGE.count("```text")


def test_examples_of_labels_give_what_the_page_says(folder: Path) -> None:
    for row in rows(folder / "labels.parquet"):
        assert row["choice"] == row["generated_text"] and row["choice"] in (" good", " bad", " not bad")
        assert 0 < row["choice_mass"] < 1 and 1 / 3 <= row["choice_probability"] <= 1


def test_examples_of_scores_give_what_the_page_says(folder: Path) -> None:
    for row in rows(folder / "tokens.parquet"):
        assert len(row["logprobs"]) == row["completion_tokens"] and {len(t["top"]) for t in row["logprobs"]} == {2}
        assert len(row["prompt_logprobs"]) == row["prompt_tokens"] - 1
    for row in rows(folder / "scores.parquet"):
        tokens = row["token_log_probabilities"]
        assert len(tokens) == row["completion_tokens"] and "".join(token["token"] for token in tokens) == row["label"]


def test_chat_examples_give_what_the_page_says(folder: Path) -> None:
    assert "reasoning" not in rows(folder / "quick.parquet")[0]
    assert [row["reasoning"] is None for row in rows(folder / "mixed.parquet")] == [True, False, False]
    for row in rows(folder / "thought.parquet"):
        assert row["reasoning"] and row["generated_text"] and row["completion_tokens"] == 32
    assert [row["tool_calls"] for row in rows(folder / "called.parquet")] == [None] * 3


def test_batch_examples_give_what_the_page_says(folder: Path) -> None:
    lines = lines_of(folder / "results.jsonl")
    assert [line["custom_id"] for line in lines] == [f"request-{i}" for i in range(4)]
    prime, rated, river = map(answered, lines[:3])
    assert prime.message.reasoning_content and prime.finish_reason == "length"
    assert river.text and river.finish_reason in ("stop", "length")
    assert 1 <= json.loads(rated.message.content)["stars"] <= 5
    assert refused(lines[3])[0] == "unsupported_url"


def test_the_page_names_all_formats() -> None:
    named = set(re.findall(r"^\| `([a-z0-9-]+)` \|", PAGE, re.MULTILINE))
    assert {*reasoning.FORMATS, *tool_calls.FORMATS} <= named


def test_rows_are_sampled_by_their_own_params(folder: Path) -> None:
    stopped, drawn, number, plain = rows(folder / "sampled.parquet")
    assert [len(row["samples"]) for row in (stopped, drawn, number, plain)] == [1, 3, 1, 1]
    assert "\n" not in stopped["generated_text"] and stopped["completion_tokens"] <= 8
    assert re.fullmatch("[0-9]{1,3}", number["generated_text"])
    assert plain["completion_tokens"] == 16 or plain["finish_reason"] == "stop"
