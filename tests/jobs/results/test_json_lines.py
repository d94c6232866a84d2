"""Outputs in JSON Lines, read by pyarrow's JSON reader and Python's json, beside the Parquet output of the same job."""

import datetime
import json
import os
import signal
import time
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.json
import pyarrow.parquet as pq
import pytest
from killed_jobs import make_job
from stub_jobs import STUB, expected, prompts, spec, write

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.job import run
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.preflight import preflight
from batchinfer.jobs.results import json_lines
from batchinfer.jobs.results.formats import FORMATS
from batchinfer.jobs.results.json_lines import JsonLines
from batchinfer.jobs.results.output_writer import OutputWriter, digest_of
from batchinfer.jobs.spec import sharded
from batchinfer.jobs.verify import verify

N = 100
ODD = [
    'say "hi"',
    "two\nlines\r\n",
    "a\u2028b\u2029c\x85d",
    "nul \0 and \x1f",
    "\\u0041 \\",
    "🙂 日本 é",
    "",
    "{}",
    "</script>",
]


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows, each of which stands alone on its line."""
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


def written(path: Path, table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table after it went through a file."""
    path.unlink(missing_ok=True)
    JsonLines.refuse_unfit(table.schema)
    with OutputWriter(path, path, table.schema) as writer:
        writer.write(table)
    return lines(path)


def test_a_job_has_the_rows_that_it_has_in_parquet(tmp_path: Path, model: Path) -> None:
    texts = [*ODD, None, *prompts(N)]
    nested = [None if i % 5 == 0 else [{"a": i, "b": [text]}] for i, text in enumerate(texts)]
    source = write(tmp_path / "in.parquet", prompt=texts, big=[2**63 - 1 - i for i in range(len(texts))], nested=nested)
    run(spec(model, source), STUB)
    report = run(spec(model, source, output=tmp_path / "lines.jsonl"), STUB)
    assert lines(tmp_path / "lines.jsonl") == pq.read_table(tmp_path / "out.parquet").to_pylist()
    read = pyarrow.json.read_json(tmp_path / "lines.jsonl")
    parquet = pq.read_table(tmp_path / "out.parquet")
    assert read.select(parquet.column_names).cast(parquet.schema).equals(parquet)
    assert report.rows == len(texts) and report.rows_failed == 2  # no prompt, and an empty one
    assert f"{len(texts):,} rows (2 error, " in verify(tmp_path / "lines.jsonl")[0]
    assert run(spec(model, source, output=tmp_path / "lines.jsonl"), STUB) == report, "complete already"


def test_samples_are_a_list_and_are_counted(tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "in.parquet", prompt=[None, *prompts(20)], samples=range(21))
    report = run(spec(model, source, n=3, columns=("prompt",), output=tmp_path / "o.jsonl"), STUB)
    rows = lines(tmp_path / "o.jsonl")
    assert rows[0]["samples"] is None and {len(row["samples"]) for row in rows[1:]} == {3}
    assert list(rows[1]["samples"][0]) == ["generated_text", "finish_reason", "completion_tokens"]
    assert f"{report.completion_tokens:,} completion tokens" in verify(tmp_path / "o.jsonl")[0]
    # A column of the input's with that name is none of the results.
    run(spec(model, source, output=tmp_path / "one.jsonl"), STUB)
    verify(tmp_path / "one.jsonl")


def test_no_rows_make_an_empty_file(tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "in.parquet", prompt=pa.array([], pa.string()))
    run(spec(model, source, output=tmp_path / "o.jsonl"), STUB)
    assert (tmp_path / "o.jsonl").read_bytes() == b"" and "0 rows" in verify(tmp_path / "o.jsonl")[0]


def test_retry_errors_and_overwrite(tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "in.parquet", prompt=[*prompts(20), None])
    output = tmp_path / "o.jsonl"
    assert run(spec(model, source, output=output), STUB).rows_failed == 1
    assert run(spec(model, source, output=output, retry_errors=True), STUB).rows_computed == 1
    verify(output)
    run(spec(model, source, output=output, overwrite=True, seed=3), STUB)
    assert [row["generated_text"] for row in lines(output)] == [*expected(model, prompts(20)), None]
    verify(output)


def test_shards_together_are_one_run(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", 64)
    source = write(tmp_path / "in.parquet", prompt=prompts(N))
    shards = [sharded(tmp_path / "o.jsonl", i, 3) for i in range(3)]
    for i, shard in enumerate(shards):
        run(spec(model, source, output=shard, shard=(i, 3)), STUB)
    assert merge_shards(shards[::-1], tmp_path / "all.jsonl", overwrite=False) == N
    run(spec(model, source, output=tmp_path / "o.jsonl"), STUB)
    assert (tmp_path / "all.jsonl").read_bytes() == (tmp_path / "o.jsonl").read_bytes()
    assert merge_shards(shards, tmp_path / "all.jsonl", overwrite=True) == N
    for other, error in (("all.parquet", Refused), ("all", Refused), ("all.csv", UsageError)):
        with pytest.raises(error, match=r"another format than output|must end in \.parquet or \.jsonl"):
            merge_shards(shards, tmp_path / other, overwrite=False)
        assert not (tmp_path / other).exists()


@pytest.fixture
def finished(tmp_path: Path, model: Path) -> Path:
    source = write(tmp_path / "in.parquet", prompt=prompts(N))
    run(spec(model, source, output=tmp_path / "o.jsonl"), STUB)
    return tmp_path / "o.jsonl"


@pytest.mark.parametrize("place", [0.0, 0.5, 0.99])
def test_a_flipped_byte_is_found(finished: Path, place: float) -> None:
    data = bytearray(finished.read_bytes())
    data[int(place * len(data))] ^= 1
    finished.write_bytes(data)
    with pytest.raises(Refused, match=r"o\.jsonl was changed: its sha256"):
        verify(finished)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'{"prompt":"prompt 7 ', b'"prompt":"prompt 7 ', "line 8 is not a row of an output: Extra data"),
        (b'{"prompt":"prompt 7 ', b'[]\n{"prompt":"prompt 7 ', "line 8 is not a row of an output"),
        (b'"finish_reason"', b'"finish_raisin"', "line 1 is not a row of an output: 'finish_reason'"),
        (b'"prompt_tokens":', b'"prompt_tokens":"x', "line 1 is not a row of an output"),
        (b'"prompt_tokens":', b'"prompt_tokens":"x","a":', "results in lines 1 to 100: .*'x'"),
        (b'"completion_tokens":8', b'"completion_tokens":9', r"counts .*, but the parts hold"),
    ],
)
def test_rows_that_are_none_are_named_though_the_digest_is_right(
    finished: Path, old: bytes, new: bytes, message: str
) -> None:
    data = finished.read_bytes()
    assert old in data
    finished.write_bytes(data.replace(old, new, 1))
    report = finished.with_suffix(".run") / "report.json"
    report.write_text(json.dumps({**json.loads(report.read_text()), "output_sha256": digest_of(finished)}))
    with pytest.raises(Refused, match=message):
        verify(finished)


def test_what_json_has_no_form_for(tmp_path: Path) -> None:
    moment = datetime.datetime(2024, 5, 17, 8, 30, 0, 250_000)
    berlin = pa.timestamp("us", "Europe/Berlin")
    number = uuid.UUID(int=5)
    columns = {
        "float": pa.array([1.5, float("nan"), None]),
        "half": pa.array([1.5, float("-inf"), None], pa.float16()),
        "floats": pa.array([[float("inf"), 2.0], None, []]),
        "decimal": pa.array([Decimal("1.10"), Decimal("-12345678901234567890.55"), None], pa.decimal128(38, 2)),
        "date": pa.array([moment.date(), datetime.date(1, 1, 1), None]),
        "time": pa.array([moment.time(), datetime.time(0), None], pa.time32("ms")),
        "moment": pa.array([moment, datetime.datetime(1, 1, 1), None], pa.timestamp("us")),
        "zoned": pa.array([moment, moment.replace(month=1), None], berlin),
        "nanos": pa.array([1, 2, None], pa.int64()).cast(pa.timestamp("ns")),
        "bytes": pa.array([b"\xff\0", b"", None]),
        "fixed": pa.array([b"ab", b"cd", None], pa.binary(2)),
        "uuid": pa.array([number.bytes, None, None], pa.uuid()),
        "json": pa.array(['{"a": 1}', "no json", None], pa.json_()),
        "unsigned": pa.array([2**64 - 1, 0, None], pa.uint64()),
        "map": pa.array([[(1, "a"), (2, None)], [], None], pa.map_(pa.int8(), pa.string())),
        "words": pa.array(["a", "b", None]).dictionary_encode(),
        "views": pa.array([["x"], [], None], pa.list_view(pa.string_view())),
        "pairs": pa.array([[1, 2], None, [3, None]], pa.list_(pa.int16(), 2)),
        "struct": pa.array([{"d": moment.date()}, None, {"d": None}]),
        "nothing": pa.nulls(3),
    }
    table = pa.table(columns)
    rows = written(tmp_path / "o.jsonl", table)
    assert rows[0] == {
        "float": 1.5,
        "half": 1.5,
        "floats": [None, 2.0],
        "decimal": "1.10",
        "date": "2024-05-17",
        "time": "08:30:00.250",
        "moment": "2024-05-17T08:30:00.250000",
        "zoned": "2024-05-17T08:30:00.250000Z",
        "nanos": "1970-01-01T00:00:00.000000001",
        "bytes": "/wA=",
        "fixed": "YWI=",
        "uuid": str(number),
        "json": {"a": 1},
        "unsigned": 2**64 - 1,
        "map": [{"key": 1, "value": "a"}, {"key": 2, "value": None}],
        "words": "a",
        "views": ["x"],
        "pairs": [1, 2],
        "struct": {"d": "2024-05-17"},
        "nothing": None,
    }
    assert (rows[1]["float"], rows[1]["half"], rows[1]["floats"]) == (None, None, None)
    assert rows[1]["decimal"] == "-12345678901234567890.55" and rows[1]["date"] == "0001-01-01"
    assert rows[1]["json"] == "no json"
    assert rows[2] == dict.fromkeys(columns) | {"floats": [], "pairs": [3, None], "struct": {"d": None}}
    for first in range(3):  # where a table begins says nothing about its rows
        assert written(tmp_path / "o.jsonl", table.slice(first, 1)) == rows[first : first + 1]
    # Who knows the types reads the values back.
    known = table.select(["date", "moment", "zoned", "nanos", "decimal", "unsigned"])
    written(tmp_path / "o.jsonl", known)
    types = [field.with_type(pa.string()) if field.name == "date" else field for field in known.schema]
    options = pyarrow.json.ParseOptions(explicit_schema=pa.schema(types))
    read = pyarrow.json.read_json(tmp_path / "o.jsonl", parse_options=options)
    assert read.cast(known.schema).equals(known)


@pytest.mark.parametrize("slice_bytes", [1 << 22, 0], ids=["rows together", "large rows"])
def test_json_is_its_value_and_what_would_not_come_out_as_it_is_remains_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slice_bytes: int
) -> None:
    monkeypatch.setattr(json_lines, "SLICE_BYTES", slice_bytes)
    values = ['[{"a": {"é": null}, "n": 3, "x": 3.0}]', "null", '"text"', " [1,\n2] ", str(2**70)]
    odd = ['["half \\ud83d"]', '{"a": 1, "a": 2}', "[NaN]", "1e999", "{", "", "[" * 5000 + "]" * 5000]
    table = pa.table({"id": range(len(values + odd) + 1), "json": pa.array([*values, *odd, None], pa.json_())})
    rows = written(tmp_path / "o.jsonl", table)
    assert json.dumps([row["json"] for row in rows]) == json.dumps([*map(json.loads, values), *odd, None])
    assert [row["id"] for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize("piece", [1, 3, 1 << 20])
def test_large_cells_are_written_as_small_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    table = pa.table(
        {'a "key"': [*ODD, None], "n": range(len(ODD) + 1), "list": [ODD] * (len(ODD) + 1), "e": [""] * (len(ODD) + 1)}
    )
    expected = written(tmp_path / "small.jsonl", table)
    assert expected == table.to_pylist()
    monkeypatch.setattr(json_lines, "SLICE_BYTES", 0)
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", piece)
    written(tmp_path / "large.jsonl", table)
    assert (tmp_path / "large.jsonl").read_bytes() == (tmp_path / "small.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (pa.duration("ms"), r"column 'x' is duration\[ms\], which JSON Lines cannot hold"),
        (pa.list_(pa.struct([("d", pa.duration("s"))])), r"column 'x' is duration\[s\] \(in list<.*>\), which"),
        (pa.month_day_nano_interval(), "is month_day_nano_interval, which"),
        (pa.dense_union([pa.field("a", pa.int8()), pa.field("b", pa.string())]), "is dense_union<.*>, which"),
        (pa.struct([("a", pa.int8()), ("a", pa.int8())]), "is a struct with two fields of the same name"),
        (pa.run_end_encoded(pa.int16(), pa.int8()), "is run_end_encoded<.*>, which"),
    ],
)
def test_a_type_without_a_form_is_refused_by_name(kind: pa.DataType, found: str) -> None:
    with pytest.raises(Refused, match=found):
        JsonLines.refuse_unfit(pa.schema([("y", pa.int8()), ("x", kind)]))


def test_nesting_without_end_is_refused() -> None:
    kind = pa.int8()
    for _ in range(json_lines.DEEPEST + 1):
        kind = pa.list_(kind)
    with pytest.raises(Refused, match="is nested deeper than 100"):
        JsonLines.refuse_unfit(pa.schema([("x", kind)]))
    JsonLines.refuse_unfit(pa.schema([("x", kind.value_type)]))


def test_a_column_that_does_not_fit_is_refused_before_any_work(tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "in.parquet", prompt=prompts(3), took=pa.array([1, 2, 3], pa.duration("ms")))
    job = spec(model, source, output=tmp_path / "o.jsonl")
    with pytest.raises(Refused, match=r"column 'took' is duration\[ms\].*--columns"):
        run(job, STUB)
    assert not (tmp_path / "o.run").exists()
    preflight(spec(model, source))
    run(spec(model, source, output=job.output, columns=("prompt",)), STUB)


def test_a_full_disk_leaves_nothing(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "the disk is full")

    job = spec(model, write(tmp_path / "in.parquet", prompt=prompts(N)), output=tmp_path / "o.jsonl")
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device: .*merged\.jsonl"):
        patch.setattr(json_lines._Lines, "write", full)
        run(job, STUB)
    assert not job.output.exists() and not list((tmp_path / "o.run" / "tmp").iterdir())
    assert run(job, STUB).rows_computed == 0
    verify(job.output)


def test_a_killed_job_goes_on(tmp_path: Path) -> None:
    job = make_job(tmp_path, output="out.jsonl")
    job.clear()
    process = job.start()
    while not list((job.output.with_suffix(".run") / "parts").glob("part-*")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not job.output.exists()
    job.check()


def test_every_format_gives_the_counts_of_what_it_wrote(tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "in.parquet", prompt=[*prompts(N), None])
    found = set()
    for suffix in FORMATS:
        run(spec(model, source, output=tmp_path / f"o{suffix}", columns=("prompt",), overwrite=True), STUB)
        found.add(verify(tmp_path / f"o{suffix}")[0].partition(": ")[2])
    assert len(found) == 1
