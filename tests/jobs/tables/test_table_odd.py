"""Tables that are merely odd: every value comes out as it went in."""

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import STUB
from stub_jobs import expected, spec, write, write_json_lines

from batchinfer.jobs.job import run
from batchinfer.jobs.tables.table import Table

P = ["a", "b", "c"]


NOON = datetime.datetime(2024, 2, 29, 12)
KEPT: dict[str, Any] = {
    "row": [7, 8, 9],
    "batchinfer": P,
    "": P,
    "a.b": P,
    "two\nlines": P,
    "é🦊": P,
    "zone": pa.array([NOON] * 3, pa.timestamp("us", "Europe/Berlin")),
    "no zone": pa.array([0, 1, 2], pa.timestamp("us", "Mars/Base")),
    "nanoseconds": pa.array([NOON] * 3, pa.timestamp("ns")),
    "date": pa.array([NOON.date()] * 3),
    "time": pa.array([NOON.time()] * 3),
    "duration": pa.array([datetime.timedelta(days=1)] * 3),
    "decimal": pa.array([decimal.Decimal("1.50")] * 3),
    "large decimal": pa.array([decimal.Decimal("1.50")] * 3, pa.decimal256(50, 2)),
    "unsigned": pa.array([2**64 - 1] * 3, pa.uint64()),
    "half": pa.array([1.5] * 3).cast(pa.float16()),
    "infinite": [float("inf"), -float("inf"), -0.0],
    "null": pa.nulls(3),
    "bytes": pa.array([b"\xff\0"] * 3),
    "struct": [{"a": {"b": [1, None]}}, None, {"a": {"b": []}}],
    "map": pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int32())),
    "pairs": pa.array([[1, 2]] * 3, pa.list_(pa.int32(), 2)),
    "dictionary": pa.array(["x", "y", "x"]).dictionary_encode(),
    "dictionary of large": pa.array(["x", "y", "x"], pa.large_string()).dictionary_encode(),
    "dictionary in a struct": pa.StructArray.from_arrays([pa.array(["x", "y", "x"]).dictionary_encode()], ["d"]),
    "large": pa.array(P, pa.large_string()),
    "view": pa.array(P, pa.string_view()),
}


def test_odd_columns_are_kept_as_they_are(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=P, **KEPT)
    before = pq.read_table(path)
    run(spec(model, path), STUB)
    after = pq.read_table(tmp_path / "out.parquet")
    for name in before.schema.names:
        assert after[name].type == before[name].type and after[name].equals(before[name]), name
    assert after["generated_text"].to_pylist() == expected(model, P)


def test_dictionaries_that_differ_by_row_group_are_kept(tmp_path: Path, model: Path) -> None:
    texts = [f"text {i // 70}" for i in range(700)]
    nested = pa.StructArray.from_arrays([pa.array(texts).dictionary_encode()], ["d"])
    write(tmp_path / "in.parquet", prompt=pa.array(texts).dictionary_encode(), nested=nested)
    run(spec(model, tmp_path / "in.parquet"), STUB)
    after = pq.read_table(tmp_path / "out.parquet")
    assert after["prompt"].to_pylist() == texts and [row["d"] for row in after["nested"].to_pylist()] == texts
    assert after["generated_text"].to_pylist() == expected(model, texts)


ODD_JSON: list[list[Any]] = [
    [2**63, -1],
    [2**60 + 1, 1.5],
    [1, "x"],
    [[1], ["x"]],
    [{"a": 1}, {"a": "x"}],
    [{"a": {}}, {"a": {"b": 1}}],
    [[[[[[]]]]], 3],
    [None, {}],
    [float("inf"), 12345678901234567],
    [True, 2],
    ["", None],
]


@pytest.mark.parametrize("values", ODD_JSON, ids=str)
@pytest.mark.parametrize("each", [1, 128])
def test_odd_values_of_json_lose_nothing(tmp_path: Path, values: list[Any], each: int) -> None:
    """Also where a value of another kind comes up only after the first block of 128."""
    all_values = [value for value in values for _ in range(each)]
    write_json_lines(tmp_path / "in.jsonl", *({"x": value} for value in all_values))
    ours = Table.open([tmp_path / "in.jsonl"])
    kept = pa.Table.from_batches([batch.replace_schema_metadata(None) for _, batch in ours.batches(None, 2048)])
    pq.write_table(kept, tmp_path / "out.parquet")
    for found, value in zip(pq.read_table(tmp_path / "out.parquet")["x"].to_pylist(), all_values, strict=True):
        as_json = isinstance(found, str) and not isinstance(value, str)
        assert without_nulls(json.loads(found) if as_json else found) == without_nulls(value)


def without_nulls(value: Any) -> Any:
    """An object in a column of objects has all their fields, and is null where they are all absent."""
    if isinstance(value, dict):
        fields = {key: without_nulls(item) for key, item in value.items()}
        return {key: item for key, item in fields.items() if item is not None} or None
    return value


def test_what_is_nested_deep_is_kept_as_json_that_can_be_read(tmp_path: Path, model: Path) -> None:
    deep = json.loads("[" * 90 + "]" * 90)
    write_json_lines(tmp_path / "in.jsonl", {"prompt": "a", "x": deep})
    run(spec(model, tmp_path / "in.jsonl"), STUB)
    assert json.loads(pq.read_table(tmp_path / "out.parquet")["x"][0].as_py()) == deep


def test_a_csv_column_may_change_its_kind_behind_the_first_block(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("batchinfer.jobs.tables.csv.CSV_BLOCK_BYTES", 1000)
    (tmp_path / "in.csv").write_text("prompt,n\n" + "word,1\n" * 500 + "word,one\n")
    ours = Table.open([tmp_path / "in.csv"])
    assert [n for _, batch in ours.batches(["n"], 100) for n in batch["n"].to_pylist()] == ["1"] * 500 + ["one"]


def test_a_csv_row_that_fits_into_no_block_is_read_with_its_neighbours(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("batchinfer.jobs.tables.csv.CSV_BLOCK_BYTES", 1000)
    monkeypatch.setattr("batchinfer.jobs.tables.csv.MAX_ROW_BYTES", 20_000)
    for large in (0, 250, 499):
        texts = [f"{i}" + ("x" * 9000 if i == large else "") for i in range(500)]
        (tmp_path / "in.csv").write_text("prompt,n\n" + "".join(f"{text},1\n" for text in texts))
        ours = Table.open([tmp_path / "in.csv"])
        found = [text for _, batch in ours.batches(["prompt"], 64) for text in batch["prompt"].to_pylist()]
        assert (ours.num_rows, found) == (500, texts)
