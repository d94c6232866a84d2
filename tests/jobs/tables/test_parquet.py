"""Parquet by other writers: INT96 timestamps, against duckdb and Python, and types that pyarrow has not."""

from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stub_jobs import STUB, make_model, spec

from batchinfer.errors import Refused
from batchinfer.jobs.job import run
from batchinfer.jobs.tables.table import Table

FAR = [datetime(9999, 12, 31), datetime(1, 1, 1), datetime(2024, 1, 1, 1, 2, 3, 456789), None, datetime(1582, 10, 4)]
NANOSECONDS = [1704067200123456789, 0, -1, None, 1]


def int96(path: Path, **columns: pa.Array) -> Path:
    """Write timestamps as Spark does: nothing else in the file says what they are."""
    prompts = pa.array([f"p{i}" for i in range(5)])
    table = pa.table({"prompt": prompts, **columns})
    pq.write_table(table, path, use_deprecated_int96_timestamps=True, store_schema=False, row_group_size=2)
    return path


def whole(path: Path) -> pa.Table:
    return pa.Table.from_batches([batch for _, batch in Table.open([path]).batches(None, 100)])


def in_duckdb(path: Path, column: str) -> list[Any]:
    return [row[0] for row in duckdb.sql(f"select \"{column}\" from '{path}'").fetchall()]


def test_int96_timestamps_of_any_year_are_what_was_written(tmp_path: Path) -> None:
    stamps = pa.array(FAR, pa.timestamp("us"))
    lists = pa.ListArray.from_arrays(pa.array(range(6), pa.int32()), stamps)
    structs = pa.StructArray.from_arrays([stamps, pa.array(range(5))], ["at", "n"])
    path = int96(tmp_path / "in.parquet", at=stamps, lists=lists, structs=structs)
    read = whole(path)
    assert read["at"].to_pylist() == FAR == in_duckdb(path, "at")
    assert read["lists"].to_pylist() == [[value] for value in FAR] == in_duckdb(path, "lists")
    assert read["structs"].to_pylist() == [{"at": value, "n": i} for i, value in enumerate(FAR)]


def test_nanoseconds_of_int96_timestamps_are_kept(tmp_path: Path) -> None:
    path = int96(tmp_path / "in.parquet", at=pa.array(NANOSECONDS, pa.timestamp("ns")))
    assert whole(path)["at"].cast(pa.int64()).to_pylist() == NANOSECONDS
    polars = pl.read_parquet(path)["at"]
    assert polars.dtype == pl.Datetime("ns") and polars.to_physical().to_list() == NANOSECONDS


def test_years_and_nanoseconds_that_no_type_holds_together_are_refused(tmp_path: Path) -> None:
    stamps, finer = pa.array(FAR, pa.timestamp("us")), pa.array(NANOSECONDS, pa.timestamp("ns"))
    path = int96(tmp_path / "in.parquet", at=stamps, other=finer)
    said = r"column 'at' has INT96 timestamps before 1677 or after 2262, and column 'other' has some with nanoseconds"
    with pytest.raises(Refused, match=said):
        Table.open([path])


def test_int96_timestamps_reach_prompts_and_outputs(tmp_path: Path) -> None:
    path = int96(tmp_path / "in.parquet", at=pa.array(FAR, pa.timestamp("us")))
    job = spec(make_model(tmp_path), path, prompt_column=None, prompt_template="{at}")
    run(job, STUB)
    written = pq.read_table(job.output)
    assert (
        written["at"].to_pylist() == FAR == in_duckdb(job.output, "at") == pl.read_parquet(job.output)["at"].to_list()
    )
    assert written["generated_text"][0].as_py() == "9999-12-"


def test_other_timestamps_keep_their_unit(tmp_path: Path) -> None:
    columns = {unit: pa.array([0, 1, None, 3, 4], pa.timestamp(unit)) for unit in ("ms", "us", "ns")}
    table = pa.table({"prompt": ["p"] * 5, **columns})
    pq.write_table(table, tmp_path / "in.parquet")
    assert whole(tmp_path / "in.parquet").equals(table)


def test_a_column_of_128_bits_is_named(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"prompt": ["a"], "wide": pl.Series([1], dtype=pl.Int128), "nested": [{"a": [1, 2], "b": "c"}]}
    )
    frame.write_parquet(tmp_path / "in.parquet")
    with pytest.raises(
        Refused, match=r"in\.parquet: column 'wide' has integers of 128 bits, and pyarrow opens no file"
    ):
        Table.open([tmp_path / "in.parquet"])
    frame.drop("wide").write_parquet(tmp_path / "in.parquet")
    assert Table.open([tmp_path / "in.parquet"]).num_rows == 1
