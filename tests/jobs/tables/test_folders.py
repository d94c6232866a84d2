"""Folders named key=value give columns, against pyarrow.dataset and duckdb, which read the same tree."""

from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from stub_jobs import STUB, make_model, spec

from batchinfer.errors import Refused
from batchinfer.jobs.job import run
from batchinfer.jobs.tables.table import Table


def tree(root: Path, *folders: str, **columns: pa.Array) -> Path:
    """A file of two rows in each folder."""
    for i, folder in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        table = pa.table({"prompt": [f"{i} a", f"{i} b"], **columns})
        pq.write_table(table, root / folder / "part.parquet")
    return root


def whole(path: Path) -> pa.Table:
    batches = [batch for _, batch in Table.open([path]).batches(None, 100)]
    return pa.concat_tables([pa.Table.from_batches([batch]) for batch in batches])


def rows(table: pa.Table) -> list[str]:
    return sorted(str(sorted(row.items())) for row in table.to_pylist())


@pytest.mark.parametrize(
    "folders",
    [
        ["year=2024", "year=2025"],
        ["year=2024/month=01", "year=2024/month=12", "year=2025/month=02"],
        ["n=-1", "n=99999999999"],
        ["n=1", "n=x"],
        ["n=1.5"],
        ["day=2024-01-31"],
        ["k=__HIVE_DEFAULT_PARTITION__", "k=7"],
        ["k=__HIVE_DEFAULT_PARTITION__", "k=a"],
        ["a%20b=c%2Fd%3De"],
        ["k=é", "k=", "k=a=b"],
        ["k=1/m=2", "k=2"],
    ],
    ids=lambda folders: " ".join(folders),
)
def test_a_tree_is_what_pyarrow_reads(tmp_path: Path, folders: list[str]) -> None:
    ours = whole(tree(tmp_path / "in", *folders))
    theirs = pyarrow.dataset.dataset(tmp_path / "in", partitioning="hive").to_table()
    assert ours.schema.equals(theirs.schema) and rows(ours) == rows(theirs)


def test_keys_reach_prompts_and_the_output(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "lang=de/year=2024", "lang=__HIVE_DEFAULT_PARTITION__/year=2025")
    (source / "_SUCCESS").touch()
    job = spec(make_model(tmp_path), source, prompt_column=None, prompt_template="{year} {prompt}")
    run(job, STUB)
    theirs = duckdb.sql(f"select prompt, lang, year from '{source}/*/*/*.parquet' order by year, prompt").fetchall()
    out = pq.read_table(job.output)
    ours = zip(*(out[name].to_pylist() for name in ("prompt", "lang", "year")), strict=True)
    assert sorted(ours, key=lambda row: (row[2], row[0])) == [(a, b, int(c)) for a, b, c in theirs]
    assert {text[:4] for text in out["generated_text"].to_pylist()} == {"2024", "2025"}


def test_a_file_that_moves_to_another_folder_is_another_input(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "year=2024")
    job = spec(make_model(tmp_path), source)
    run(job, STUB)
    (source / "year=2024").rename(source / "year=2025")
    with pytest.raises(Refused, match="was begun with another input"):
        run(job, STUB)


@pytest.mark.parametrize(
    ("column", "key"),
    [
        (pa.array([2024] * 2), "2024"),
        (pa.array(["2024"] * 2), "2024"),
        (pa.array(["de"] * 2).dictionary_encode(), "de"),
        (pa.nulls(2, pa.int64()), "__HIVE_DEFAULT_PARTITION__"),
    ],
)
def test_a_key_that_a_column_repeats_is_that_column(tmp_path: Path, column: pa.Array, key: str) -> None:
    read = whole(tree(tmp_path / "in", f"k={key}", k=column))
    assert read.column_names == ["prompt", "k"] and read["k"].to_pylist() == column.to_pylist()


@pytest.mark.parametrize(
    ("column", "key"),
    [
        (pa.array([2024, 2025]), "2024"),
        (pa.array([2024, None]), "2024"),
        (pa.array(["2024", "x"]), "2024"),
        (pa.array([{"a": 1}] * 2), "de"),
        (pa.array([1, None]), "__HIVE_DEFAULT_PARTITION__"),
    ],
)
def test_a_key_that_a_column_contradicts_is_refused(tmp_path: Path, column: pa.Array, key: str) -> None:
    path = tree(tmp_path / "in", f"k={key}", k=column)
    with pytest.raises(Refused, match=r"part\.parquet: column 'k' has other values than .*, which its folder's name"):
        Table.open([path])


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("k=1/k=2", "gives the key 'k', which a folder above it gives too"),
        ("k=%FF", "its name is not UTF-8"),
        ("plain", "is a directory; expected a regular file"),
    ],
)
def test_folders_that_are_no_keys_are_refused(tmp_path: Path, folder: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        Table.open([tree(tmp_path / "in", folder)])
