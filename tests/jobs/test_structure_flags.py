"""Jobs whose answers follow schemas: typed columns, schemas of rows, resuming, shards, duplicates, and refusals."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_models import chat_model
from command_line import call
from whole_jobs import assert_parts_make_the_whole

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused
from batchinfer.jobs.job import run
from batchinfer.jobs.results.structure_columns import structure_columns, structure_fields
from batchinfer.jobs.rows.windows import LIMITS, Limits, Windows
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.structure_flags import StructureFlags
from batchinfer.jobs.verify import verify

TEXTS = ["Hello", "the user", "a model of the system " * 9, "Hello", "x", "the end"]
RECORD: dict[str, Any] = {
    "type": "object",
    "$defs": {"Color": {"type": "string", "enum": ["red", "blue"]}},
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "x": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 9}, {"type": "null"}]},
        "ok": {"type": ["boolean", "null"]},
        "color": {"$ref": "#/$defs/Color"},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "n", "tags"],
}
TYPES = {
    "name": pa.string(), "n": pa.int64(), "x": pa.float64(), "ok": pa.bool_(), "color": pa.string(),
    "tags": pa.list_(pa.string()),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(make_model, tmp_path_factory.mktemp("models"))


def job(model: Path, folder: Path, sampling: SamplingParams | None = None, **fields: Any) -> JobSpec:
    given = {"inputs": (folder / "in.parquet",), "output": folder / "out.parquet", "prompt_column": "prompt"}
    sampling = sampling or SamplingParams(max_tokens=80, temperature=1.0)
    return JobSpec(
        **{**given, "model": str(model), "device": "cpu", "dtype": "float32", "sampling": sampling, **fields}
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def test_properties_become_columns(model: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": TEXTS}), tmp_path / "in.parquet")
    sampling = SamplingParams(max_tokens=65, temperature=1.0, json_schema=json.dumps(RECORD))
    fields: dict[str, Any] = {"sampling": sampling, "output_columns": True}
    report = run(job(model, tmp_path, **fields))
    assert report.forced > 20 and report.rows_duplicate == 1 and report.rows_failed == 0
    table = pq.read_table(tmp_path / "out.parquet")
    assert {name: table.schema.field(name).type for name in TYPES} == TYPES
    found = table.to_pylist()
    for row in found:
        cut = row["finish_reason"] == "length"
        answer = {} if cut else json.loads(row["generated_text"])
        assert {name: row[name] for name in TYPES} == {name: answer.get(name) for name in TYPES}
        cut or jsonschema.validate(answer, RECORD)
    assert {row["finish_reason"] for row in found} == {"stop", "length"}
    verify(tmp_path / "out.parquet")
    assert_parts_make_the_whole(partial(job, model, tmp_path, **fields), tmp_path / "out.parquet")
    with pytest.raises(Refused, match="template"):
        run(job(model, tmp_path, sampling))
    other: dict[str, Any] = {"output": tmp_path / "other.parquet", "reuse": (tmp_path / "out.parquet",)}
    with pytest.raises(Refused, match=r"other result columns than this job: \[.*'name'.*\]; .* as --output-columns"):
        run(job(model, tmp_path, sampling, **other))
    with pytest.raises(Refused, match="sampling"):
        run(job(model, tmp_path, SamplingParams(max_tokens=65, temperature=1.0, regex="a"), output_columns=False))


@pytest.mark.parametrize("window", [LIMITS, Limits(slice_rows=2, window_grammar_bytes=1)])
def test_each_row_follows_its_own_schema(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: Limits
) -> None:
    """Also where a window has no room for all of them."""
    init = Windows.__init__
    monkeypatch.setattr(Windows, "__init__", lambda *args, **kw: init(*args, **{**kw, "limits": window}))
    schemas: list[Any] = [{"enum": [1, 2]}, {"enum": ["a", "b"]}, {"enum": [1, 2]}, RECORD, {"not": {}}, None, "", "{"]
    texts = [each if isinstance(each, str | None) else json.dumps(each) for each in schemas]
    pq.write_table(pa.table({"prompt": ["Hello"] * 8, "schema": texts}), tmp_path / "in.parquet")
    report = run(job(model, tmp_path, json_schema_column="schema"))
    assert report.rows_duplicate == (1 if window is LIMITS else 0), "rows with another schema are no duplicates"
    found = rows_of(tmp_path / "out.parquet")
    for row, schema in zip(found[:4], schemas, strict=False):
        if row["finish_reason"] == "stop":
            jsonschema.validate(json.loads(row["generated_text"]), schema)
    assert [row["finish_reason"] for row in found[:3]] == ["stop"] * 3
    assert [row["error_code"] for row in found[4:]] == ["bad_schema"] * 4
    assert found[4]["error_message"].startswith("the schema has the keyword 'not' at #/not")
    assert found[0]["generated_text"] == found[2]["generated_text"]


def test_schemas_in_json_lines_may_be_objects_or_texts(model: Path, tmp_path: Path) -> None:
    for name, schema in {"objects": {"enum": [7]}, "texts": json.dumps({"enum": [7]})}.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"prompt": "Hello", "schema": schema}) + "\n" for _ in range(2)))
        run(job(model, tmp_path, inputs=(file,), output=tmp_path / f"{name}.parquet", json_schema_column="schema"))
        assert [row["generated_text"] for row in rows_of(tmp_path / f"{name}.parquet")] == ["7", "7"]


def test_samples_follow_the_schema_and_columns_are_of_the_first(model: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["Hello"]}), tmp_path / "in.parquet")
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9999}},
        "required": ["n"],
    }
    sampling = SamplingParams(max_tokens=40, temperature=1.0, json_schema=json.dumps(schema))
    run(job(model, tmp_path, sampling, n=3, output_columns=True))
    (row,) = rows_of(tmp_path / "out.parquet")
    numbers = [json.loads(sample["generated_text"])["n"] for sample in row["samples"]]
    assert row["n"] == numbers[0] and len(set(numbers)) > 1


FLAT = StructureFlags(output_columns=True)


def fields_of(schema: dict[str, Any]) -> list[pa.Field]:
    return structure_fields(FLAT, SamplingParams(json_schema=json.dumps(schema)))


def test_values_that_a_column_cannot_hold_are_null() -> None:
    whole, real = {"type": "integer"}, {"type": "number"}
    fields = fields_of(
        {"properties": {"i": whole, "x": real, "l": {"type": "array", "items": whole}, "c": {"const": 1.5}}}
    )
    assert [field.type for field in fields] == [pa.int64(), pa.float64(), pa.list_(pa.int64()), pa.float64()]
    texts = [
        '{"i": 9223372036854775807, "x": 1, "l": [1, 9223372036854775808]}', '{"i": 9223372036854775808, "x": 1e999}',
        '{"x": 1' + "0" * 400 + "}", '{"i": 1', '{"i": 1}', None,
    ]  # fmt: skip
    reasons = ["stop", "stop", "stop", "stop", "length", "error"]
    columns = structure_columns(fields, pa.array(texts, pa.string()), pa.array(reasons))
    assert columns[0].to_pylist() == [9223372036854775807, None, None, None, None, None]
    assert columns[1].to_pylist() == [1.0, None, None, None, None, None]
    assert columns[2].to_pylist()[0] == [1, None]


NESTED = '{"properties": {"a": {"type": "object", "properties": {"b": {}}}}}'


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--json-schema", "{"], "--json-schema is not JSON"),
        (["--json-schema", "nowhere.json"], "which is neither a JSON object nor a file"),
        (["--json-schema", "1" * 300], "which is neither a JSON object nor a file"),
        (["--json-schema", '{"uniqueItems": true}'], "the keyword 'uniqueItems' at #/uniqueItems"),
        (["--regex", "(a"], "--regex cannot be followed: unclosed group"),
        (["--grammar", "nowhere"], "which is neither a grammar nor a file"),
        (["--grammar", "start: foo"], '--grammar cannot be followed: at 1(8): unknown name: "foo"'),
        (["--regex", "a", "--json-schema", "{}"], "--json-schema is given, and regex too"),
        (
            ["--regex", "a", "--max-thinking-tokens", "3"],
            "closes thinking, and --regex leaves none",
        ),
        (["--regex", "a", "--chat", "--reasoning-parser", "think"], "looks for thinking, and --regex leaves none"),
        (["--regex", "a", "--ignore-eos"], "says where an answer ends"),
        (["--json-schema-column", "c", "--ignore-eos"], "--ignore-eos goes on after the end of an answer"),
        (["--regex", "a", "--json-schema-column", "c"], "leave one of them out"),
        (["--json-schema-column", "c", "--choices", "a,b"], "--json-schema-column is for answers that are generated"),
        (["--output-columns"], "--output-columns needs --json-schema"),
        (["--output-columns", "--json-schema", '{"type": "array"}'], "needs a --json-schema of an object"),
        (["--output-columns", "--json-schema", NESTED], "property 'a' is neither a text"),
        (["--output-columns", "--json-schema", '{"properties": {"samples": {"type": "null"}}}'], "property 'samples'"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "c": ["{}"]}), tmp_path / "in.parquet")
    command = ["run", tmp_path / "in.parquet", "-o", tmp_path / "out.parquet", "--model", model]
    code, error = call(capsys, *command, *flags)
    assert code == 2 and said in error
    assert not (tmp_path / "out.run").exists()


def test_columns_that_do_not_fit_are_refused(model: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "c": [1]}), tmp_path / "in.parquet")
    with pytest.raises(Refused, match="column 'c' is int64; expected JSON schemas as text"):
        run(job(model, tmp_path, json_schema_column="c"))
    sampling = SamplingParams(json_schema='{"properties": {"c": {"type": "string"}}}')
    with pytest.raises(Refused, match="has a column 'c', which the output adds itself"):
        run(job(model, tmp_path, sampling, output_columns=True))


def test_files_and_tables_hold_schemas_and_grammars(model: Path, tmp_path: Path) -> None:
    """A job file has the schema as a table, or the name of a file beside it."""
    from batchinfer.jobs.cli.run import job_of

    (tmp_path / "s.json").write_text('{"enum": [1]}')
    (tmp_path / "g.lark").write_text('start: "a"')
    arguments = [str(tmp_path / "in.parquet"), "-o", "out.parquet", "--model", str(model)]
    assert job_of([*arguments, "--json-schema", str(tmp_path / "s.json")]).sampling.json_schema == '{"enum": [1]}'
    assert job_of([*arguments, "--grammar", str(tmp_path / "g.lark")]).sampling.grammar == 'start: "a"'
    config = tmp_path / "job.toml"
    config.write_text('json-schema = "s.json"')
    assert job_of([*arguments, "--config", str(config)]).sampling.json_schema == '{"enum": [1]}'
    config.write_text('[json-schema]\ntype = "object"\n[json-schema.properties.b]\ntype = "string"\n')
    assert json.loads(job_of([*arguments, "--config", str(config)]).sampling.json_schema or "") == {
        "type": "object",
        "properties": {"b": {"type": "string"}},
    }
