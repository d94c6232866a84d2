"""Equal values of a table's columns, against Python's own comparison of their texts."""

from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.jobs.rows import field_values
from batchinfer.jobs.rows.field_values import read_field_values
from batchinfer.jobs.tables.table import Table

COLUMNS: dict[str, Any] = {
    "text": ["naïve", "日本", "", "naïve", None, "x", "x"] * 3,
    "number": [1, 2, 1, 10, 1, None, 2] * 3,
    "truth": [True, False, True, True, False, True, False] * 3,
    "day": [date(2026, 1, 1), date(2026, 1, 2), *[date(2026, 1, 1)] * 5] * 3,
    "kind": pa.array(["p", "q", "p", "q", "p", "q", "q"] * 3).dictionary_encode(),
}


@pytest.mark.parametrize("batch_rows", [2, 5, 100])
def test_rows_without_nulls_are_equal_where_their_texts_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    monkeypatch.setattr(field_values, "BATCH_ROWS", batch_rows)
    pq.write_table(pa.table(COLUMNS), tmp_path / "in.parquet")
    found = read_field_values(Table.open([tmp_path / "in.parquet"]), list(COLUMNS))
    rows = [row for row in pa.table(COLUMNS).to_pylist() if None not in row.values()]
    assert found.rows == len(rows) == 15 and found.step == 1
    for name, codes, lengths in zip(COLUMNS, found.codes, found.lengths, strict=True):
        texts = [str(row[name]).lower() if name == "truth" else str(row[name]) for row in rows]
        assert lengths.tolist() == [len(text.encode()) for text in texts]
        assert len(set(zip(codes.tolist(), texts, strict=True))) == len(set(codes.tolist())) == len(set(texts))
        assert codes.min() >= 0 and codes.max() < len(rows)


def test_a_column_of_nulls_and_a_table_without_rows_have_no_values(tmp_path: Path) -> None:
    for name, values in {"nulls": [None, None], "none": []}.items():
        pq.write_table(pa.table({"a": pa.array(values, pa.string()), "b": values}), tmp_path / f"{name}.parquet")
        assert read_field_values(Table.open([tmp_path / f"{name}.parquet"]), ["a", "b"]).rows == 0


def test_of_a_large_table_every_kth_row_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field_values, "MOST_ROWS", 10)
    monkeypatch.setattr(field_values, "BATCH_ROWS", 4)
    pq.write_table(pa.table({"a": [f"{i}" * i for i in range(25)]}), tmp_path / "in.parquet")
    found = read_field_values(Table.open([tmp_path / "in.parquet"]), ["a"])
    assert found.step == 3
    assert found.lengths[0].tolist() == [len(f"{i}" * i) for i in range(0, 25, 3)]
