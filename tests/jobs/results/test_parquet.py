"""Dictionaries in Parquet outputs: their order and all of their values survive, in every column and row group."""

from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.jobs.results import parquet
from batchinfer.jobs.results.parquet import Parquet


def categories(values: list[str], names: list[str], ordered: bool) -> pa.DictionaryArray:
    indices = pa.array([names.index(value) for value in values], pa.int8())
    return pa.DictionaryArray.from_arrays(indices, pa.array(names), ordered=ordered)


def rows(values: list[str], names: list[str], nested: bool) -> pa.Table:
    ordered, plain = (categories(values, names, each) for each in (True, False))
    offsets = pa.array(range(len(values) + 1), pa.int32())
    columns: dict[str, Any] = {"ordered": ordered, "plain": plain}
    if nested:
        columns["list"] = pa.ListArray.from_arrays(offsets, plain)
        columns["struct"] = pa.StructArray.from_arrays([ordered, pa.array(values)], ["a", "b"])
        columns["map"] = pa.MapArray.from_arrays(offsets, pa.array(["k"] * len(values)), plain)
    return pa.table(columns)


FEW, MANY = ["lo", "hi"], ["lo", "mid", "hi", "unused"]


def through(path: Path, tables: list[pa.Table], again: bool = False) -> list[pa.Table]:
    """The tables' rows from a file, and if `again` from a second file that was written from it, as `merge` does."""
    with pa.OSFile(str(path), "wb") as file, Parquet.open(file, tables[0].schema) as writer:
        for table in tables:
            writer.write(table)
    slices = list(Parquet.slices(path))
    return through(path.with_name("again.parquet"), slices) if again else slices


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_dictionaries_come_back(tmp_path: Path, nested: bool, again: bool) -> None:
    tables = [
        rows(values, names, nested)
        for values, names in ((["hi", "lo"], FEW), (["hi", "mid"], MANY), (["lo", "mid"], MANY), (["hi"], FEW))
    ]
    found = through(tmp_path / "out.parquet", tables, again)
    theirs = pa.concat_tables(tables)
    assert pa.concat_tables(found).to_pylist() == theirs.to_pylist() and found[0].schema == theirs.schema
    dictionaries = [table["ordered"].chunk(0).dictionary.to_pylist() for table in found]
    assert [names for i, names in enumerate(dictionaries) if names != dictionaries[i - 1] or not i] == [FEW, MANY, FEW]


def test_categories_that_continue_others_share_a_row_group(tmp_path: Path) -> None:
    tables = [rows(["hi", "lo"], names, False) for names in (FEW, [*FEW, "higher"], FEW)]
    (found,) = through(tmp_path / "out.parquet", tables)
    assert found["ordered"].chunk(0).dictionary.to_pylist() == [*FEW, "higher"]
    assert found["ordered"].to_pylist() == ["hi", "lo"] * 3


def test_polars_reads_nested_dictionaries_of_several_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "GROUP_BYTES", 1)
    tables = [rows(["hi", "mid"], MANY, True).drop_columns("map") for _ in range(3)]
    through(tmp_path / "out.parquet", tables)
    assert pq.read_metadata(tmp_path / "out.parquet").num_row_groups == 3
    assert pl.read_parquet(tmp_path / "out.parquet").to_dicts() == pa.concat_tables(tables).to_pylist()
