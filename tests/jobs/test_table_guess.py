"""Guesses of how a table's prompts are made, from its columns' names and values."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchinfer.jobs.table_guess import guess, is_batch_file
from batchinfer.jobs.tables.table import Table

CHAT = [[{"role": "user", "content": "hi"}]] * 3
LONG = ["a rather long text " * 5 + str(i) for i in range(3)]


def table(tmp_path: Path, **columns: Any) -> Table:
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    return Table.open([tmp_path / "t.parquet"])


@pytest.mark.parametrize(
    ("columns", "kind", "column", "id_column"),
    [
        ({"prompt": LONG, "answer": LONG}, "prompt", "prompt", None),
        ({"id": [1, 2, 3], "Question": LONG, "text": LONG}, "prompt", "Question", "id"),
        ({"review_id": ["a", "b", "c"], "review": LONG, "label": ["x", "x", "y"]}, "text", "review", "review_id"),
        ({"label": ["x", "x", "y"], "notes": LONG, "code": ["1", "2", "3"]}, "text", "notes", None),
        ({"messages": CHAT, "prompt": LONG}, "messages", "messages", None),
        ({"dialogue": CHAT}, "messages", "dialogue", None),
        ({"conversation": [json.dumps(chat) for chat in CHAT]}, "messages", "conversation", None),
        ({"user_id": [1, 1, 2], "text": LONG}, "text", "text", None),
        ({"id": [1, 2, None], "text": LONG}, "text", "text", None),
        ({"doc id": [1, 2, 3], "text": LONG}, "text", "text", "doc id"),
        ({"orderId": [1, 2, 3], "text": LONG}, "text", "text", "orderId"),
        ({"review.text": LONG}, "prompt", "review.text", None),
        ({"number": [1, 2, 3], "share": [0.1, 0.2, 0.3]}, "none", "", None),
    ],
)
def test_the_likely_column_is_named(
    tmp_path: Path, columns: dict[str, Any], kind: str, column: str, id_column: str | None
) -> None:
    found = guess(table(tmp_path, **columns))
    assert (found.kind, found.column, found.id_column) == (kind, column, id_column)


def test_nulls_and_other_columns_are_told(tmp_path: Path) -> None:
    found = guess(table(tmp_path, text=["a", None, "b"], title=LONG, n=[1, 2, 3]))
    assert (found.nulls, found.rows, found.others) == (1, 3, ("title",))


def test_other_columns_are_those_that_a_template_can_name(tmp_path: Path) -> None:
    others = {"b": LONG, "": LONG, "No.": LONG, "a:b": LONG, "none": pa.nulls(3), "a": LONG}
    assert guess(table(tmp_path, text=["a b c"] * 3, **others)).others == ("b", "a")


def test_ids_of_two_kinds_are_no_ids(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"id": 1, "text": "a"}\n{"id": "one", "text": "b"}\n')
    assert guess(Table.open([tmp_path / "t.jsonl"])).id_column is None


def test_an_empty_table_has_no_prompts(tmp_path: Path) -> None:
    assert guess(table(tmp_path, text=pa.array([], pa.string()))).kind == "none"


REQUEST = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "hi"}}


@pytest.mark.parametrize(
    ("name", "text", "batch"),
    [
        ("a.jsonl", json.dumps(REQUEST), True),
        ("a.ndjson", json.dumps(REQUEST), True),
        ("a.jsonl", json.dumps({"prompt": "hi"}), False),
        ("a.jsonl", "[1]", False),
        ("a.jsonl", "{", False),
        ("a.jsonl", "", False),
        ("a.csv", json.dumps(REQUEST), False),
    ],
)
def test_files_of_requests_are_told_from_tables(tmp_path: Path, name: str, text: str, batch: bool) -> None:
    (tmp_path / name).write_text(text + "\n")
    assert is_batch_file((tmp_path / name,)) == batch
    assert not is_batch_file((tmp_path,)) and not is_batch_file((tmp_path / "none.jsonl",))
