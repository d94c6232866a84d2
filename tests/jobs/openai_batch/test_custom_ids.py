"""Requests with the custom_id of an earlier line are found, across files and shards."""

from pathlib import Path

import pytest
from batch_files import chat, write_batch

from batchinfer.errors import Refused
from batchinfer.jobs.openai_batch import custom_ids
from batchinfer.jobs.openai_batch.custom_ids import repeated
from batchinfer.jobs.tables.table import Table


def test_only_lines_with_an_id_of_an_earlier_line_are_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_ids, "BATCH_ROWS", 2)
    first = write_batch(tmp_path / "a.jsonl", chat("a"), b"", chat("b"), b"{", chat("a"), b"{", chat(None))
    second = write_batch(tmp_path / "b.jsonl", chat("b"), chat("c"), chat(3), chat(3), chat("a"))
    table = Table.open([first, second], lines=True)
    assert table.num_rows == 11
    assert repeated(table) == {3: 1, 6: 3, 10: 1}


def test_an_empty_table_and_one_that_changed(tmp_path: Path) -> None:
    blank = Table.open([write_batch(tmp_path / "blank.jsonl", b" ")], lines=True)
    assert repeated(blank) == {}
    path = write_batch(tmp_path / "a.jsonl", chat("a"), chat("b"))
    table = Table.open([path], lines=True)
    for lines in ([chat("a")], [chat("a"), chat("b"), chat("c")]):
        write_batch(path, *lines)
        with pytest.raises(Refused, match="changed while it was read"):
            repeated(table)
