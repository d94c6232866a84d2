"""A selection takes the rows that DuckDB takes, in every format; a sample is fair, and the same each time."""

import csv
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.errors import Refused
from batchinfer.jobs.tables import selection
from batchinfer.jobs.tables.json_lines import indices_not_text
from batchinfer.jobs.tables.selection import Selection, digest, sample
from batchinfer.jobs.tables.table import Table

ROWS = 1000
LANGUAGES = ["de", "en", None, "fr"]


def rows() -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [
        {"i": i, "lang": LANGUAGES[random.integers(4)], "review": "x" * int(random.integers(40)), "text": f"text {i}"}
        for i in range(ROWS)
    ]


def parquet(folder: Path) -> Path:
    table = pa.Table.from_pylist(rows())
    table = table.append_column("view", table["text"].cast(pa.string_view()))
    table = table.append_column("kind", table["lang"].dictionary_encode())
    pq.write_table(table, folder / "in.parquet", row_group_size=300)
    return folder / "in.parquet"


def json_lines(folder: Path) -> Path:
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return folder / "in.jsonl"


def csv_file(folder: Path) -> Path:
    with (folder / "in.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["i", "lang", "review", "text"])
        writer.writeheader()
        writer.writerows(rows())
    return folder / "in.csv"


def keyed_folder(folder: Path) -> Path:
    for language in LANGUAGES:
        mine = [{**row, "lang": None} for row in rows() if row["lang"] == language]
        place = folder / "in" / f"lang={language or '__HIVE_DEFAULT_PARTITION__'}"
        place.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(mine).drop(["lang"]), place / "a.parquet")
    return folder / "in"


FORMATS = [parquet, json_lines, csv_file, keyed_folder]


def read(table: Table, columns: list[str], size: int) -> list[dict[str, Any]]:
    """The rows, whose ordinals must be right."""
    found: list[dict[str, Any]] = []
    for first, batch in table.batches(columns, size):
        assert first == len(found) and len(batch) <= size
        found += batch.to_pylist()
    assert len(found) == table.num_rows
    return found


@pytest.mark.parametrize("make", FORMATS)
@pytest.mark.parametrize(
    ("where", "sql"),
    [
        ("lang == 'de' and length(review) > 20", "lang = 'de' AND length(review) > 20"),
        ("not lang in ['de', 'fr']", "NOT lang IN ('de', 'fr')"),
        ("lang is None", "lang IS NULL"),
        ("text == 'text 7' or text == 'text 999'", "text IN ('text 7', 'text 999')"),
        ("text == 'none'", "false"),
    ],
)
def test_each_format_gives_the_rows_that_duckdb_selects(
    tmp_path: Path, make: Callable[[Path], Path], where: str, sql: str
) -> None:
    whole = Table.open([make(tmp_path)])
    if make is csv_file and where == "lang is None":
        where, sql = "lang == ''", "lang = ''"  # CSV has no null
    database = duckdb.connect()
    database.register("everything", pa.Table.from_pylist(read(whole, ["i", "lang", "review", "text"], 999)))
    expected = database.execute(f"SELECT i FROM everything WHERE {sql}").fetchall()
    selected = Selection(where, None, None, 0).of(whole)
    for size in (1, 64, 4096):
        assert [(row["i"],) for row in read(selected, ["text", "i"], size)] == expected
    shards = [read(selected.shard(index, 3), ["i"], 50) for index in range(3)]
    assert [(row["i"],) for shard in shards for row in shard] == expected
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_all_columns_of_the_selected_rows_are_as_they_were(tmp_path: Path) -> None:
    whole = Table.open([parquet(tmp_path)])
    selected = Selection("length(review) > 20", None, None, 0).of(whole)
    expected = [row for row in read(whole, whole.schema.names, 100) if len(row["review"]) > 20]
    assert read(selected, whole.schema.names, 100) == expected
    assert all(batch.schema.types == whole.schema.types for _, batch in selected.batches(None, 100))


def test_values_that_are_no_text_in_json_are_known_after_selecting(tmp_path: Path) -> None:
    values = ["a", 1, "b", {"c": 2}, None, "d", [3]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"x": x, "i": i}) + "\n" for i, x in enumerate(values)))
    table = Selection("i != 0 and i != 2 and i != 4", None, None, 0).of(Table.open([tmp_path / "in.jsonl"]))
    ((_, batch),) = table.batches(["x"], 100)
    assert batch.column("x").to_pylist() == ["1", '{"c": 2}', "d", "[3]"]
    assert indices_not_text(batch, "x") == [0, 1, 3]


@settings(max_examples=60, deadline=None)
@given(
    where=st.sampled_from([None, "length(review) > 20", "lang == 'de'", "lang == 'none'"]),
    count=st.none() | st.integers(1, 1200), limit=st.none() | st.integers(1, 1200), seed=st.integers(0, 3),
    shards=st.integers(1, 4), size=st.sampled_from([7, 300, 5000]),
)  # fmt: skip
def test_where_then_sample_then_limit(
    files: Path, where: str | None, count: int | None, limit: int | None, seed: int, shards: int, size: int
) -> None:
    whole = Table.open([files])
    conditions = {"length(review) > 20": lambda r: len(r["review"]) > 20, "lang == 'de'": lambda r: r["lang"] == "de"}
    left = [row["i"] for row in rows() if where is None or conditions.get(where, lambda r: r["lang"] == "none")(row)]
    selected = Selection(where, count, limit, seed).of(whole)
    found = [row["i"] for i in range(shards) for row in read(selected.shard(i, shards), ["i"], size)]
    sampled = [row["i"] for row in read(Selection(where, count, None, seed).of(whole), ["i"], 100)]
    assert sampled == sorted(sampled) and set(sampled) <= set(left)
    assert len(sampled) == min(len(left), count or len(left))
    assert found == sampled[:limit]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parquet(tmp_path_factory.mktemp("files"))


def test_a_sample_is_one_of_all_with_equal_chances() -> None:
    """Two of 5 rows can be drawn in 10 ways. 5.9 standard deviations are off by chance once in a hundred million."""
    draws = 10_000
    for count, ways in ((2, 10), (3, 10), (4, 5)):
        found = Counter(tuple(sample(5, count, seed).nonzero()[0].tolist()) for seed in range(draws))
        assert len(found) == ways and all(len(rows) == count for rows in found)
        spread = (draws / ways * (1 - 1 / ways)) ** 0.5
        assert all(abs(times - draws / ways) < 5.9 * spread for times in found.values())


def test_a_larger_sample_contains_the_smaller_one_up_to_half_of_the_rows() -> None:
    samples = [set(sample(1000, count, 7).nonzero()[0].tolist()) for count in (1, 10, 100, 499, 500)]
    assert all(smaller < larger for smaller, larger in pairwise(samples))


def test_samples_are_the_same_in_every_version() -> None:
    assert sample(100, 5, 0).nonzero()[0].tolist() == [17, 24, 33, 71, 94]
    assert sample(3, 5, 0).tolist() == [True] * 3 and sample(0, 5, 0).tolist() == []


def test_the_digest_is_that_of_the_rows(files: Path) -> None:
    whole = Table.open([files])
    first = digest(Selection(None, None, 10, 0).of(whole))
    assert first == digest(Selection("i < 10", None, None, 0).of(whole)) != ""
    assert first != digest(Selection("i < 11", None, None, 0).of(whole))
    assert digest(Selection(None, None, None, 0).of(whole)) == ""


def test_files_without_a_selected_row_are_not_read(tmp_path: Path) -> None:
    for name, day in (("a", date(2024, 1, 1)), ("b", date(2024, 1, 2)), ("c", date(2024, 1, 3))):
        pq.write_table(pa.table({"day": [day] * 10, "text": ["x"] * 10}), tmp_path / f"{name}.parquet")
    selected = Selection("day == '2024-01-02'", None, None, 0).of(Table.open([tmp_path]))
    for name in ("a", "c"):
        (tmp_path / f"{name}.parquet").write_bytes(b"damaged")
    assert [row["day"] for row in read(selected, ["day"], 100)] == [date(2024, 1, 2)] * 10


@pytest.mark.parametrize("left", [5, 200])
def test_a_file_that_changed_after_the_choice_is_refused(tmp_path: Path, left: int) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"i": range(100)}), path)
    selected = Selection("i >= 0 and i != 98", None, None, 0).of(Table.open([path]))
    pq.write_table(pa.table({"i": range(left)}), path)
    with pytest.raises(Refused, match="changed while it was read: it had 100 rows"):
        read(selected, ["i"], 64 if left == 5 else 77)


@pytest.mark.parametrize("rows", [5, 200])
def test_a_file_that_changed_before_the_choice_is_refused(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"i": range(100)}), path)
    table = Table.open([path])
    pq.write_table(pa.table({"i": range(rows)}), path)
    with pytest.raises(Refused, match="the input changed while it was read; give the command again"):
        Selection("i >= 0", None, None, 0).of(table)


def test_a_choice_takes_a_bit_of_each_row_and_three_bytes_while_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "DRAWN_ROWS", 1 << 12)  # of which a few numbers of 8 bytes are in memory
    rows = 1 << 20
    tracemalloc.start()
    try:
        chosen = Selection(None, rows * 7 // 10, 10, 0).of(Table((), pa.schema([]), rows)).chosen
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert chosen is not None and chosen.nbytes == rows // 8
    assert peak < 3.3 * rows
