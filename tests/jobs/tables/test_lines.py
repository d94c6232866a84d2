"""Lines of any bytes as rows: their numbers and their bytes, in blocks of any size."""

from pathlib import Path

import pytest

from batchinfer.jobs.tables import lines
from batchinfer.jobs.tables.table import Table

TEXT = b'\xef\xbb\xbf{"a": 1}\r\n\n  \t\r\n\x00\xff\nthe last, without an end'
EXPECTED = [(1, b'{"a": 1}'), (4, b"\x00\xff"), (5, b"the last, without an end")]


def rows(table: Table, size: int) -> list[tuple[int, bytes | None]]:
    return [
        (row["number"], row["line"])
        for _, batch in table.batches(["number", "line"], size)
        for row in batch.to_pylist()
    ]


@pytest.mark.parametrize("size", [1, 2, 100])
def test_each_line_that_is_not_blank_is_a_row(tmp_path: Path, size: int) -> None:
    for name in ("a.jsonl", "b.ndjson"):
        (tmp_path / name).write_bytes(TEXT)
    table = Table.open([tmp_path / "a.jsonl", tmp_path / "b.ndjson"], lines=True)
    assert table.num_rows == 6
    assert rows(table, size) == EXPECTED * 2
    assert rows(table.shard(1, 3), size) == [EXPECTED[2], EXPECTED[0]]


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_that_is_too_long_has_no_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bytes) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 8)
    texts = [b"12345678", b"123456789", b"x" * 30, b"end"]
    for last in range(len(texts)):
        chosen = texts[: last + 1]
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(chosen) + end)
        kept = [text if len(text) <= 8 else None for text in chosen]
        assert [line for _, line in rows(Table.open([tmp_path / "a.jsonl"], lines=True), 2)] == kept


def test_a_batch_is_full_when_its_bytes_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BATCH_BYTES", 10)
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([b"12345", b"12345", b"1", b"x" * 20, b"2"]))
    table = Table.open([tmp_path / "a.jsonl"], lines=True)
    assert [len(batch) for _, batch in table.batches(["line"], 100)] == [2, 1, 1, 1]
