"""Whole jobs whose answers are parsed: the columns, in every output, through resume, shards, duplicates and samples."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from stub_jobs import make_model, spec, write

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Interrupted, Refused, UsageError
from batchinfer.jobs.incremental import run_new_rows
from batchinfer.jobs.job import run
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.preflight import preflight
from batchinfer.jobs.report import Report, read_report
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.spec import JobSpec, sharded
from batchinfer.jobs.verify import verify

# An engine that answers with what stands before a ~ in the prompt.
ENGINES = """
import numpy as np
from batchinfer.engine.request import Completions, FinishReason
from batchinfer.jobs.process.stub_engine import StubEngine

class Says(StubEngine):
    def __init__(self, config, tokenizer):
        super().__init__(config, tokenizer)
        self._end = tokenizer.vocabulary["~"]

    def add(self, requests):
        for first in range(0, len(requests), 4):
            super().add(requests.take(np.arange(first, min(first + 4, len(requests)))))

    def step(self):
        requests = self._waiting.popleft()
        rows = np.split(requests.token_ids, requests.offsets[1:-1])
        said = [row[: row.tolist().index(self._end)] for row in rows]
        self._stats.steps += 1
        reasons = np.full(len(rows), FinishReason.STOP, np.int8)
        return Completions(requests.rows, np.concatenate(said), np.cumsum([0, *map(len, said)]), reasons)
"""
SAID = "{{ messages[0].content }}~{{ tools | tojson if tools else '' }}"
OPEN = SAID + "<think>\n"
MAYBE = SAID + "{% if enable_thinking | default(true) %}<think>\n{% else %}<think></think>{% endif %}"
CALLING = OPEN + "{# <tool_call> #}"
CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
ANSWERS = [
    "why</think>\n\n4",
    "no end",
    "~",
    f"x</think>I look.{CALL}{CALL}",
    f"y</think>{CALL[:-20]}",
    "why</think>\n\n4",
]
CALLED = [{"name": "f", "arguments": '{"a": 1}'}]
COLUMNS = ["generated_text", "reasoning", "tool_calls", "finish_reason"]
EXPECTED = [
    ("4", "why", None),
    ("", "no end", None),
    ("", None, None),
    ("I look.", "x", CALLED * 2),
    (CALL[:-20], "y", None),
    ("4", "why", None),
    (None, None, None),
]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    (tmp_path / "engines_that_say.py").write_text(ENGINES)
    monkeypatch.syspath_prepend(tmp_path)
    return "engines_that_say:{}".format


def make_chat(folder: Path, template: str) -> Path:
    folder.mkdir(exist_ok=True)
    model = make_model(folder, max_position_embeddings=1024)
    (model / "chat_template.jinja").write_text(template)
    return model


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    (tmp_path / "tools.json").write_text('[{"name": "f"}]')
    path = write(tmp_path / "in.parquet", prompt=[*ANSWERS, None], id=list(range(7)))
    model = make_chat(tmp_path / "chat", CALLING)
    return spec(model, path, chat=True, tools=tmp_path / "tools.json", sampling=SamplingParams(max_tokens=200))


def rows_of(path: Path) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in COLUMNS[:3]) for row in pq.read_table(path).to_pylist()]


def test_thinking_and_calls_have_columns_that_other_programs_read(
    tmp_path: Path, job: JobSpec, engine: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(job, engine("Says"))
    told = [
        "thinking goes to the column 'reasoning' (--reasoning-parser think, told by the chat template)",
        "tool calls go to the column 'tool_calls' (--tool-parser hermes, told by the chat template)",
    ]
    assert report.notes == told
    assert all(note in capsys.readouterr().err for note in told[:1])
    assert rows_of(job.output) == EXPECTED
    schema = pq.read_schema(job.output)
    assert schema.names[2:6] == COLUMNS
    assert schema.field("tool_calls").type == pa.list_(pa.struct([("name", pa.string()), ("arguments", pa.string())]))
    assert report.unparsed_tool_calls == read_report(job.output).unparsed_tool_calls == 1
    assert "unparsed calls" in report.table() and "1 answer has what looks like a tool call" in report.table()
    assert verify(job.output)
    found = duckdb.sql(f"select tool_calls[1].name, tool_calls[2].arguments->>'a' from '{job.output}' where id = 3")
    assert found.fetchall() == [("f", "1")]
    calls = polars.read_parquet(job.output).explode("tool_calls").unnest("tool_calls").drop_nulls("name")
    assert calls["arguments"].str.json_path_match("$.a").to_list() == ["1", "1"]
    assert pandas.read_parquet(job.output)["reasoning"].to_list()[:2] == ["why", "no end"]
    run(replace(job, output=tmp_path / "out.jsonl"), engine("Says"))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [tuple(line[name] for name in COLUMNS[:3]) for line in lines] == EXPECTED
    assert verify(tmp_path / "out.jsonl")


def test_a_job_goes_on_with_its_columns_and_no_others(job: JobSpec, engine: Callable[[str], str]) -> None:
    job, commit = replace(job, commit_rows=1), RunFolder.commit

    def commit_once(self: RunFolder, finished: list[pa.RecordBatch]) -> None:
        if any(self.parts.iterdir()):
            raise Interrupted("enough for the test")
        commit(self, finished)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RunFolder, "commit", commit_once)
        run(job, engine("Says"))
    with pytest.raises(Refused, match="begun with another reasoning_parser and tool_parser;"):
        run(replace(job, reasoning_parser="none", tool_parser="none"), engine("Says"))
    with pytest.raises(Refused, match="begun with another reasoning_parser;"):
        run(replace(job, reasoning_parser="seed"), engine("Says"))
    report = run(job, engine("Says"))
    assert 0 < report.rows_resumed < report.rows
    assert rows_of(job.output) == EXPECTED


def test_shards_merge_to_the_whole(tmp_path: Path, job: JobSpec, engine: Callable[[str], str]) -> None:
    shards = [replace(job, shard=(i, 2), output=sharded(job.output, i, 2)) for i in range(2)]
    for shard in shards:
        run(shard, engine("Says"))
    merge_shards([shard.output for shard in shards], tmp_path / "merged.parquet", False)
    assert rows_of(tmp_path / "merged.parquet") == EXPECTED


def test_duplicates_have_what_is_parsed_too(tmp_path: Path, job: JobSpec, engine: Callable[[str], str]) -> None:
    path = write(tmp_path / "same.parquet", prompt=[ANSWERS[3]] * 9 + [ANSWERS[4]] * 3)
    report = run(replace(job, inputs=(path,)), engine("Says"))
    assert report.rows_duplicate == 10 and report.unparsed_tool_calls == 3
    assert rows_of(job.output) == [EXPECTED[3]] * 9 + [EXPECTED[4]] * 3


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_samples_have_what_is_parsed_too(
    tmp_path: Path, job: JobSpec, engine: Callable[[str], str], suffix: str
) -> None:
    warm = SamplingParams(max_tokens=200, temperature=1.0)
    job = replace(job, sampling=warm, n=3, output=tmp_path / f"out.{suffix}")
    report = run(job, engine("Says"))
    read = pq.read_table(job.output).to_pylist() if suffix == "parquet" else []
    rows = read or [json.loads(line) for line in job.output.read_text().splitlines()]
    for row, expected in zip(rows, EXPECTED, strict=True):
        assert tuple(row[name] for name in COLUMNS[:3]) == expected
        if expected[0] is None:
            assert row["samples"] is None
            continue
        assert [tuple(sample[name] for name in COLUMNS[:3]) for sample in row["samples"]] == [expected] * 3
        assert list(row["samples"][0]) == [*COLUMNS, "completion_tokens"]
    assert verify(job.output) and report.unparsed_tool_calls == 3


def test_notes_of_pandas_know_the_columns(tmp_path: Path, job: JobSpec, engine: Callable[[str], str]) -> None:
    pandas.DataFrame({"prompt": ANSWERS}, index=pandas.Index(range(6), name="at")).to_parquet(tmp_path / "p.parquet")
    run(replace(job, inputs=(tmp_path / "p.parquet",)), engine("Says"))
    found = pandas.read_parquet(job.output)
    assert found.index.name == "at" and found["tool_calls"][3][1]["name"] == "f" and found["reasoning"][0] == "why"


def test_an_incremental_output_has_the_columns(tmp_path: Path, job: JobSpec, engine: Callable[[str], str]) -> None:
    job = replace(job, incremental=True, id_column="id", output=tmp_path / "grown")

    def run_part(part: JobSpec) -> Report:
        return run(part, engine("Says"))

    run_new_rows(job, run_part)
    write(tmp_path / "in.parquet", prompt=[*ANSWERS, None, ANSWERS[0]], id=list(range(8)))
    run_new_rows(job, run_part)
    assert rows_of(tmp_path / "grown" / "part-000001.parquet") == EXPECTED
    assert rows_of(tmp_path / "grown" / "part-000002.parquet") == EXPECTED[:1]


@pytest.mark.parametrize(
    ("template", "fields", "columns", "note"),
    [
        (SAID, {}, [], None),
        (OPEN, {}, ["reasoning"], "thinking goes to the column"),
        (OPEN, {"reasoning_parser": "none"}, [], None),
        (SAID, {"reasoning_parser": "think"}, ["reasoning"], None),
        (MAYBE, {}, ["reasoning"], "thinking goes to the column"),
        (MAYBE, {"chat_template_kwargs": {"enable_thinking": False}}, [], "answers have no thinking, since"),
        (MAYBE, {"chat_template_kwargs": {"enable_thinking": False}, "chat_template_kwargs_column": "k"},
         ["reasoning"], "thinking goes to the column"),
        (SAID + "{{ '</think>' if messages[9] }}", {}, [], "does not show whether the model thinks: if it does, give"),
        (OPEN, {"chat": False}, [], None),
    ],
)  # fmt: skip
def test_the_column_is_there_where_the_model_thinks(
    tmp_path: Path,
    engine: Callable[[str], str],
    template: str,
    fields: dict[str, Any],
    columns: list[str],
    note: str | None,
) -> None:
    kwargs = ['{"enable_thinking": true}', None]
    path = write(tmp_path / "in.parquet", prompt=["a</think>b~", "c</think>d~"], k=kwargs)
    made = spec(make_chat(tmp_path / "chat", template), path, **{"chat": True, **fields})
    report = run(made, engine("Says"))
    names = pq.read_schema(made.output).names
    assert [name for name in ("reasoning", "tool_calls") if name in names] == columns
    assert (len(report.notes) == 1 and note in report.notes[0]) if note else not report.notes
    texts = pq.read_table(made.output)["generated_text"].to_pylist()
    assert texts == (["b", "d"] if columns else ["a</think>b", "c</think>d"])


@pytest.mark.parametrize(
    ("template", "fields", "told"),
    [
        (OPEN, {"choices": ("a", "b")}, "and labels leave no room"),
        (MAYBE, {"sampling": SamplingParams(regex="a")}, "and answers that follow a form leave no room"),
        (MAYBE, {"choices": ("a", "b"), "chat_template_kwargs": {"enable_thinking": False}}, None),
        (SAID, {"choices": ("a", "b")}, None),
    ],
)
def test_answers_without_room_for_thinking_are_told_of(
    tmp_path: Path, template: str, fields: dict[str, Any], told: str | None
) -> None:
    path = write(tmp_path / "in.parquet", prompt=["a"])
    notes = preflight(spec(make_chat(tmp_path / "chat", template), path, chat=True, **fields)).notes
    assert [told in note for note in notes] == [True] if told else not notes


def test_a_rows_own_arguments_say_whether_its_prompt_opens_the_thinking(
    tmp_path: Path, engine: Callable[[str], str]
) -> None:
    kwargs = ['{"enable_thinking": true}', '{"enable_thinking": false}', None]
    path = write(tmp_path / "in.parquet", prompt=["cut in it~"] * 3, k=kwargs)
    made = spec(make_chat(tmp_path / "chat", MAYBE), path, chat=True, chat_template_kwargs_column="k")
    run(made, engine("Says"))
    found = pq.read_table(made.output).select(["reasoning", "generated_text"]).to_pylist()
    assert [tuple(row.values()) for row in found] == [("cut in it", ""), (None, "cut in it"), ("cut in it", "")]


def test_thinking_is_closed_by_the_tags_of_the_model(tmp_path: Path) -> None:
    path, model = write(tmp_path / "in.parquet", prompt=["a"]), make_chat(tmp_path / "chat", OPEN)
    made = spec(model, path, chat=True, sampling=SamplingParams(max_tokens=9, max_thinking_tokens=3))
    with pytest.raises(UsageError, match="--max-thinking-tokens needs thinking tags that are a token each"):
        preflight(made)
    backend = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.add_tokens(["<think>", "</think>"])
    backend.save(str(model / "tokenizer.json"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": backend.get_vocab_size()}))
    found = preflight(made)
    assert found.spec.sampling.thinking_tags == tuple(map(backend.token_to_id, ("<think>", "</think>")))
    assert found.source.tokenize(0, pa.record_batch({"prompt": ["a"]}))[0].params[0] == found.spec.sampling
    with pytest.raises(UsageError, match="--max-thinking-tokens needs a --reasoning-parser"):
        preflight(replace(made, reasoning_parser="none"))
    other = preflight(replace(made, sampling=SamplingParams(max_tokens=9))).fingerprints
    assert [name for name in other if other[name] != found.fingerprints[name]] == ["sampling"]


def test_an_input_column_of_the_name_is_refused_with_the_remedy(
    tmp_path: Path, job: JobSpec, engine: Callable[[str], str]
) -> None:
    path = write(tmp_path / "in2.parquet", prompt=ANSWERS, reasoning=ANSWERS)
    job = replace(job, inputs=(path,))
    with pytest.raises(Refused, match=r"has a column 'reasoning', .* in generated_text with --reasoning-parser none"):
        run(job, engine("Says"))
    with pytest.raises(Refused, match=r"name the columns to keep with --columns$"):
        run(replace(job, reasoning_parser="think"), engine("Says"))
    run(replace(job, reasoning_parser="none"), engine("Says"))
    assert pq.read_table(job.output)["reasoning"].to_pylist() == ANSWERS
    run(replace(job, columns=("prompt",), output=tmp_path / "o.parquet"), engine("Says"))
    assert rows_of(tmp_path / "o.parquet") == EXPECTED[:6]
