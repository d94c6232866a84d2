"""Whole jobs over conversations: their columns in the output, as other programs read it, and tools."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stub_jobs import STUB, make_model, spec, write_json_lines

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused
from batchinfer.jobs.job import run
from batchinfer.jobs.outlook import plan

CHATS: list[Any] = [
    [{"role": "user", "content": "é"}, {"role": "assistant", "tool_calls": [{"arguments": arguments}]}]
    for arguments in ({"b": 1, "a": None}, {"a": 1.5}, {})
]


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    (tmp_path / "chat").mkdir()
    folder = make_model(tmp_path / "chat")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ messages[1].tool_calls[0].arguments | tojson }}"})
    )
    return folder


def test_messages_of_json_lines_come_out_as_they_went_in(tmp_path: Path, chat_model: Path) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", *({"chat": chat} for chat in CHATS))
    job = spec(chat_model, path, prompt_column=None, messages_column="chat", sampling=SamplingParams(max_tokens=60))
    run(job, STUB)
    run(replace(job, output=tmp_path / "out.jsonl"), STUB)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert json.dumps([line["chat"] for line in lines]) == json.dumps(CHATS)
    assert [json.loads(line["generated_text"]) for line in lines] == [
        chat[1]["tool_calls"][0]["arguments"] for chat in CHATS
    ]
    out = str(tmp_path / "out.parquet")
    assert isinstance(pq.read_schema(out).field("chat").type, pa.JsonType)
    texts = [json.dumps(chat, ensure_ascii=False) for chat in CHATS]
    assert pq.read_table(out)["chat"].to_pylist() == pandas.read_parquet(out)["chat"].to_list() == texts
    assert [row[0] for row in duckdb.sql(f"select chat->>'$[0].content' from '{out}'").fetchall()] == ["é"] * 3
    assert duckdb.sql(f"select typeof(chat) from '{out}' limit 1").fetchall() == [("JSON",)]
    assert polars.read_parquet(out)["chat"].ext.storage().to_list() == texts


def test_tools_that_a_template_never_reads_are_told(
    tmp_path: Path, chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", {"chat": CHATS[0], "tools": [{"name": "f"}]})
    job = spec(chat_model, path, prompt_column=None, messages_column="chat", tools_column="tools")
    said = "chat template of .* never reads tools: --tools-column tools is in vain"
    (note,) = run(job, STUB).notes
    assert re.search(said, note) and re.search(said, capsys.readouterr().err)
    assert any(re.search(said, note) for note in plan(job).notes)
    with pytest.raises(Refused, match="begun with another template"):
        run(replace(job, tools_column=None), STUB)
    (chat_model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ tools }}"}))
    assert not any("in vain" in note for note in run(replace(job, overwrite=True), STUB).notes)


def test_the_template_for_tools_is_tried_before_the_job(tmp_path: Path, chat_model: Path) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", {"prompt": "x", "tools": None})
    forbidden = "{{ ''.__class__.__mro__ }}"
    for source, said in (("{% if %}", "has a syntax error on line 1"), (forbidden, "did what its sandbox forbids")):
        named = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": source}]
        (chat_model / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
        with pytest.raises(Refused, match=said):
            run(spec(chat_model, path, chat=True, tools_column="tools"), STUB)
        assert run(spec(chat_model, path, chat=True, overwrite=True), STUB).rows_ok == 1
