"""The examples of docs/answers.md run as they stand, one after the other, with a tiny chat model."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from chat_models import SPECIAL, TAGS, save
from repository import ROOT

from batchinfer.text import reasoning, tool_calls

PAGE = (ROOT / "docs" / "answers.md").read_text()
EXAMPLE = re.compile(r"^```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
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
    tools = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for language, code in EXAMPLE.findall(PAGE):
        command = ["bash", "-e", "-c", code] if language == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=there, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stderr}"
    return there


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    assert all(row["error_code"] is None for row in found)
    return found


def test_chat_examples_give_what_the_page_says(folder: Path) -> None:
    assert "reasoning" not in rows(folder / "quick.parquet")[0]
    assert [row["reasoning"] is None for row in rows(folder / "mixed.parquet")] == [True, False, False]
    for row in rows(folder / "thought.parquet"):
        assert row["reasoning"] and row["generated_text"] and row["completion_tokens"] == 32
    assert [row["tool_calls"] for row in rows(folder / "called.parquet")] == [None] * 3


def test_the_page_names_all_formats() -> None:
    named = set(re.findall(r"^\| `([a-z0-9-]+)` \|", PAGE, re.MULTILINE))
    assert {*reasoning.FORMATS, *tool_calls.FORMATS} <= named
