"""Text that is not UTF-8 reaches no output: other libraries read it, and find what Python makes of such bytes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from stub_jobs import STUB, spec

from batchinfer.jobs.incremental import run_new_rows
from batchinfer.jobs.job import run
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.report import read_report
from batchinfer.jobs.results.valid_text import with_valid_text
from batchinfer.jobs.spec import sharded

STRING = pa.string()
RAW = [b"ok", b"Jos\xe9", None, b"\xe2\x82 \xff\xff", b"", b"Jos\xe8"]
TEXT = [value if value is None else value.decode(errors="replace") for value in RAW]


def text(values: list[bytes | None], kind: pa.DataType = STRING) -> pa.Array:
    """Text of any bytes, which pyarrow does not check."""
    raw = pa.array(values, pa.binary_view() if kind == pa.string_view() else pa.large_binary())
    return pc.cast(raw, options=pc.CastOptions(kind, allow_invalid_utf8=True))


def odd(kind: str) -> pa.Array:
    """Six rows with the values of `RAW` in them."""
    plain = text(RAW)
    offsets = [0, 2, None, 3, 3, 4, 6]
    absent = pa.array([i == 3 for i in range(6)])
    made: dict[str, Any] = {
        "string": lambda: plain,
        "large": lambda: text(RAW, pa.large_string()),
        "view": lambda: text(RAW, pa.string_view()),
        "json": lambda: pa.ExtensionArray.from_storage(pa.json_(), plain),
        "struct": lambda: pa.StructArray.from_arrays([plain, pa.array(range(6))], ["a", "b"], mask=absent),
        "list": lambda: pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), plain),
        "large list": lambda: pa.LargeListArray.from_arrays(
            pa.array(offsets, pa.int64()), text(RAW, pa.large_string())
        ),
        "list view": lambda: pa.ListViewArray.from_arrays([4, 2, 0, 3, 3, 0], [2, 1, 0, 0, 1, 2], plain, mask=absent),
        "pairs": lambda: pa.FixedSizeListArray.from_arrays(pa.concat_arrays([plain, plain]), 2, mask=absent),
        "map": lambda: pa.MapArray.from_arrays(pa.array(range(7), pa.int32()), text([b"k \xff"] * 6), plain),
        "list of structs": lambda: pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), odd("struct")),
    }
    found: pa.Array = made[kind]()
    return found


KINDS = [
    "string",
    "large",
    "view",
    "json",
    "struct",
    "list",
    "large list",
    "list view",
    "pairs",
    "map",
    "list of structs",
]


def decoded(array: pa.Array) -> Any:
    """The values, by way of bytes and Python."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return decoded(array.storage)
    if pa.types.is_struct(kind):
        children = [decoded(child) for child in array.flatten()]
        rows = [dict(zip(kind.names, row, strict=True)) for row in zip(*children, strict=True)]
        return [row if valid else None for row, valid in zip(rows, array.is_valid().to_pylist(), strict=True)]
    if pa.types.is_map(kind):
        entries = array.cast(pa.list_(pa.struct([("k", kind.key_type), ("v", kind.item_type)])))
        return [None if row is None else [(e["k"], e["v"]) for e in row] for row in decoded(entries)]
    if pa.types.is_nested(kind):
        flat, lists = iter(decoded(pc.list_flatten(array))), pc.list_value_length(array).to_pylist()
        return [None if count is None else [next(flat) for _ in range(count)] for count in lists]
    if pa.types.is_integer(kind):
        return array.to_pylist()
    raw = array.cast(pa.large_binary()).to_pylist()
    return [value if value is None else value.decode(errors="replace") for value in raw]


def inner(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [text for part in parts for text in inner(part)]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_text_of_any_depth_becomes_what_python_decodes(kind: str, first: int) -> None:
    array = odd(kind).slice(first)
    replaced: Counter[str] = Counter()
    ((row, batch),) = with_valid_text([(7, pa.record_batch({"x": array}))], replaced)
    assert row == 7 and batch.schema.field("x").type == array.type
    batch.validate(full=True)
    expected = decoded(array)
    assert batch["x"].to_pylist() == expected
    assert replaced == {"x": sum("\ufffd" in value for value in inner(expected))}


def test_valid_columns_are_not_copied() -> None:
    array = pa.array([["a"], None, ["é\ufffd"]])
    replaced: Counter[str] = Counter()
    ((_, batch),) = with_valid_text([(0, pa.record_batch({"x": array}))], replaced)
    assert not replaced and batch["x"].buffers()[1].address == array.buffers()[1].address


def readings(path: Path) -> list[list[dict[str, Any]]]:
    """All rows of a Parquet file, as each library reads them."""
    read = duckdb.sql(f"select * from '{path}'")
    duck = [dict(zip(read.columns, row, strict=True)) for row in read.fetchall()]
    cache = str(path.parent / "cache")
    return [
        duck,
        pl.read_parquet(path).to_dicts(),
        pq.read_table(path).to_pylist(),
        datasets.Dataset.from_parquet(str(path), cache_dir=cache).to_list(),
    ]


def test_a_kept_column_of_csv_in_another_encoding_is_readable_and_told(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b"id,author,prompt\n1,Jos\xe9,def a(\n2,Ann,def b(\n3,Zo\xeb,bad \xe9\n")
    report = run(spec(model, tmp_path / "in.csv"), STUB)
    for rows in readings(tmp_path / "out.parquet"):
        assert [row["author"] for row in rows] == ["Jos\ufffd", "Ann", "Zo\ufffd"]
        assert [row["prompt"] for row in rows] == ["def a(", "def b(", "bad \ufffd"]
        assert [row["error_code"] for row in rows] == [None, None, "invalid_utf8"]
    assert report.replaced_text == {"author": 2, "prompt": 1} == read_report(tmp_path / "out.parquet").replaced_text
    (line,) = [line for line in report.table().splitlines() if "'author'" in line]
    assert "bytes that are not UTF-8 (values: 2)" in line and "--csv-encoding" in line


def test_bytes_in_json_are_replaced_one_by_one(tmp_path: Path, model: Path) -> None:
    lines = [b'{"prompt": "a", "x": "Jos\xe9 \xe2\x82"}', b'{"prompt": "b", "x": "\\ud800"}', b'{"prompt": "\xff"}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    report = run(spec(model, tmp_path / "in.jsonl"), STUB)
    for rows in readings(tmp_path / "out.parquet"):
        assert [row["x"] for row in rows] == ["Jos\ufffd \ufffd", "\ufffd", None]
        assert [row["error_code"] for row in rows] == [None, None, "invalid_utf8"]
    assert report.replaced_text == {"x": 2, "prompt": 1}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_text_within_other_types_is_readable(tmp_path: Path, model: Path, suffix: str) -> None:
    columns = {kind: odd(kind) for kind in KINDS if kind != "json"}  # duckdb parses JSON
    pq.write_table(pa.table({"prompt": list("abcdef"), **columns}), tmp_path / "in.parquet")
    output = tmp_path / f"out{suffix}"
    report = run(spec(model, tmp_path / "in.parquet", output=output), STUB)
    assert report.replaced_text.keys() == columns.keys()
    if suffix == ".jsonl":
        written = [json.loads(line) for line in output.read_bytes().decode().splitlines()]
    else:
        pq.read_table(output).validate(full=True)
        read = duckdb.sql(f"select * from '{output}'")
        written = [dict(zip(read.columns, row, strict=True)) for row in read.fetchall()]
    assert [row["string"] for row in written] == TEXT
    assert [row["list"] for row in written] == decoded(odd("list"))
    assert [row["struct"] for row in written] == decoded(odd("struct"))


def test_shards_and_growing_tables_hold_valid_text_too(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b"id,by,prompt\n" + b"".join(b"%d,\xe9,p \xff\n" % i for i in range(4)))
    shards = [sharded(tmp_path / "out.parquet", i, 2) for i in range(2)]
    for i, output in enumerate(shards):
        run(spec(model, tmp_path / "in.csv", output=output, shard=(i, 2)), STUB)
    merge_shards(shards, tmp_path / "all.parquet", overwrite=False)
    growing = spec(model, tmp_path / "in.csv", output=tmp_path / "answers", incremental=True, id_column="id")
    report = run_new_rows(growing, lambda part: run(part, STUB))
    assert report.replaced_text == {"by": 4, "prompt": 4}
    assert run_new_rows(growing, lambda part: run(part, STUB)) == report, "the same rows are not new"
    for path in (tmp_path / "all.parquet", tmp_path / "answers" / "part-000001.parquet"):
        rows = pl.read_parquet(path).to_dicts()
        assert [(row["by"], row["prompt"], row["error_code"]) for row in rows] == [
            ("\ufffd", "p \ufffd", "invalid_utf8")
        ] * 4
