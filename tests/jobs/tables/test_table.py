"""What the reader yields, against pyarrow reading the same file whole; and what it refuses, in one line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import pytest
from repository import ROOT

from batchinfer.errors import Refused
from batchinfer.jobs.tables import batches
from batchinfer.jobs.tables.json_lines import indices_not_text
from batchinfer.jobs.tables.table import Table


def parquet(path: Path, table: pa.Table, **options: Any) -> Path:
    pq.write_table(table, path, **options)
    return path


def whole(table: Table, columns: list[str] | None = None, rows: int = 1000) -> pa.Table:
    """All batches as one table, once their ordinals, sizes and columns are found right."""
    batches, expected = [], 0
    for first, batch in table.batches(columns, rows):
        assert first == expected and 0 < batch.num_rows <= rows
        assert batch.schema.names == (table.schema.names if columns is None else columns)
        expected += batch.num_rows
        batches.append(batch.replace_schema_metadata(None))
    assert expected == table.num_rows
    return pa.Table.from_batches(
        batches, None if batches else pa.schema([table.schema.field(c) for c in columns or []])
    )


def example(n: int) -> pa.Table:
    names = [None if i % 7 == 0 else f"name {i % 50}" for i in range(n)]
    return pa.table(
        {
            "id": range(n),
            "prompt": [f"prompt {i}" for i in range(n)],
            "name": pa.array(names).dictionary_encode(),
            "large": pa.array(names, pa.large_string()),
            "view": pa.array(names, pa.string_view()),
            "messages": [[{"role": "user", "content": str(i)}] for i in range(n)],
        }
    )


@pytest.mark.parametrize("rows", [1, 7, 1000, 1024, 5000, 100_000])
def test_parquet_equals_what_was_written(tmp_path: Path, rows: int) -> None:
    n = 60 if rows == 1 else 6000
    table = example(n)
    ours = Table.open([parquet(tmp_path / "in.parquet", table, row_group_size=1700)])
    assert ours.schema == table.schema and ours.num_rows == n
    assert whole(ours, rows=rows).equals(table)
    columns = ["view", "id"]  # in the order asked for, not in the file's
    assert whole(ours, columns, rows).equals(table.select(columns))


def test_files_follow_each_other(tmp_path: Path) -> None:
    table = example(3000)
    paths = [parquet(tmp_path / f"{i}.parquet", table.slice(i * 1000, 1000)) for i in range(3)]
    empty = parquet(tmp_path / "empty.pq", table.slice(0, 0))
    assert whole(Table.open([paths[0], empty, *paths[1:]])).equals(table)
    other_order = parquet(tmp_path / "order.parquet", table.slice(1000).select(table.schema.names[::-1]))
    assert whole(Table.open([paths[0], other_order])).equals(table)


def test_no_rows(tmp_path: Path) -> None:
    ours = Table.open([parquet(tmp_path / "in.parquet", example(0))])
    assert ours.num_rows == 0 and list(ours.batches(None, 10)) == []


def test_batches_stop_growing_at_a_number_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"prompt": [f"{i:06}" * 100 for i in range(20_000)]})
    ours = Table.open([parquet(tmp_path / "in.parquet", table)])
    monkeypatch.setattr(batches, "BATCH_BYTES", 1 << 20)
    sizes = [batch.nbytes for _, batch in ours.batches(None, 100_000)]
    assert len(sizes) >= 8 and max(sizes) <= 2 << 20
    assert whole(ours, rows=100_000).equals(table)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    letters = os.urandom(50 << 20).hex()  # nothing that compresses
    values = [letters[i : i + 1600] for i in range(0, len(letters), 1600)]
    path = parquet(
        tmp_path / "in.parquet", pa.table({"prompt": values}), row_group_size=len(values), compression="none"
    )
    assert path.stat().st_size > 100 << 20
    code = """
import pathlib, sys, pyarrow.parquet
from batchinfer.jobs.tables.table import Table
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) << 10
before = peak()
rows = sum(batch.num_rows for _, batch in Table.open([pathlib.Path(sys.argv[1])]).batches(None, 2048))
print(rows, peak() - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    rows, grown = map(int, done.stdout.split())
    assert rows == len(values)
    assert grown < 70 << 20


def test_a_column_with_a_dot_in_its_name_is_not_a_field_of_another(tmp_path: Path) -> None:
    table = pa.table({"a.b": ["text"], "a": [{"b": 2}]})
    assert whole(Table.open([parquet(tmp_path / "in.parquet", table)]), ["a.b"]).equals(table.select(["a.b"]))


def test_csv_is_text(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(b'\xef\xbb\xbfid,prompt,none\n007,"two\nlines, one cell",\n08,"",NA\n9,"say ""hi""",null\n')
    ours = Table.open([path])
    assert ours.schema == pa.schema([(name, pa.string()) for name in ("id", "prompt", "none")])
    assert whole(ours).to_pydict() == {
        "id": ["007", "08", "9"],
        "prompt": ["two\nlines, one cell", "", 'say "hi"'],
        "none": ["", "NA", "null"],
    }
    assert whole(ours, ["prompt"], rows=1).num_rows == 3


def test_csv_with_bytes_that_are_no_utf8_loses_no_row(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b"id,prompt\n1,good\n2,bad \xff\n3,good\n")
    ((_, batch),) = Table.open([tmp_path / "in.csv"]).batches(None, 10)
    assert batch.column("id").to_pylist() == ["1", "2", "3"] and batch.column("prompt")[2].as_py() == "good"
    with pytest.raises(pa.ArrowInvalid, match="string index 1"):
        batch.validate(full=True)


def test_csv_without_rows(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,prompt\n")
    ours = Table.open([tmp_path / "in.csv"])
    assert ours.num_rows == 0 and ours.schema.names == ["id", "prompt"]
    assert list(ours.batches(None, 10)) == []


def test_csv_of_several_blocks_equals_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchinfer.jobs.tables.csv.CSV_BLOCK_BYTES", 4096)
    table = pa.table({"id": [str(i) for i in range(5000)], "prompt": [f"line {i}\nnext, {i}" for i in range(5000)]})
    pyarrow.csv.write_csv(table, tmp_path / "in.csv")
    assert whole(Table.open([tmp_path / "in.csv"]), rows=999).equals(table)


def lines(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_json_lines_equal_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "batchinfer.jobs.tables.json_lines.JSON_BLOCK_BYTES", 2000
    )  # many blocks, and types that only later ones show
    values: list[dict[str, Any]] = [
        {
            "id": i,
            "prompt": f"prompt {i} é🦊",
            "late": None if i < 1500 else "text",
            "number": i if i < 1500 else i / 2,
            "flag": i % 2 == 0,
            "messages": [] if i == 0 else [{"role": "user", "content": str(i)}],
            "nested": {"a": i} if i < 1500 else {"b": [1.5]},
        }
        for i in range(3000)
    ]
    values[10]["new"] = 1
    path = lines(tmp_path / "in.jsonl", *values)
    ours = Table.open([path])
    theirs = pyarrow.json.read_json(path, pyarrow.json.ReadOptions(block_size=1 << 24))
    assert set(ours.schema.names) == set(theirs.schema.names)
    assert whole(ours).to_pylist() == theirs.select(ours.schema.names).to_pylist()
    assert whole(ours, ["late", "id"], rows=100).equals(theirs.select(["late", "id"]))


def test_json_values_that_are_no_text_are_kept_and_told(tmp_path: Path) -> None:
    prompts = ["text", 3, None, ["a"], {"b": 1}, True, "3"]
    path = lines(tmp_path / "in.ndjson", *({"id": i, "prompt": prompt} for i, prompt in enumerate(prompts)))
    ours = Table.open([path])
    assert ours.schema == pa.schema([("id", pa.int64()), ("prompt", pa.string())])
    (_, batch), (first, second) = ours.batches(None, 4)
    assert batch.column("prompt").to_pylist() == ["text", "3", None, '["a"]']
    assert indices_not_text(batch, "prompt") == [1, 3] and indices_not_text(batch, "id") == []
    assert (first, indices_not_text(second, "prompt")) == (4, [0, 1])
    assert second.column("prompt").to_pylist() == ['{"b": 1}', "true", "3"]


@pytest.mark.parametrize("values", [[2**70, 1], [{}, {}], [[1], ["a"]], [1, True], [2**60 + 1, 1.5]])
def test_json_values_that_a_column_cannot_hold_become_json_text(tmp_path: Path, values: list[Any]) -> None:
    ours = Table.open([lines(tmp_path / "in.jsonl", *({"x": value} for value in values))])
    assert [json.loads(text) for text in whole(ours).column("x").to_pylist()] == values
    pq.write_table(whole(ours), tmp_path / "out.parquet")  # and every one can be written


def test_json_lines_with_bytes_that_are_no_utf8_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "good"}\n\n{"prompt": "bad \xff"}\n{"prompt": "half \\ud800"}\n  \n')
    ours = Table.open([path])
    ((_, batch),) = ours.batches(None, 10)
    assert ours.num_rows == 3 and batch.column("prompt")[0].as_py() == "good"
    with pytest.raises(pa.ArrowInvalid, match="string index 1"):
        batch.validate(full=True)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "in.parquet", pa.table({"id": [1], "text": ["a"]}))
    with pytest.raises(Refused, match=r"in.parquet has no column 'prompt'; its columns are 'id', 'text'"):
        Table.open([path]).check(["text", "prompt"])
    with pytest.raises(Refused, match="no column 'prompt'"):
        list(Table.open([path]).batches(["prompt"], 10))


def flipped(path: Path) -> None:
    table = pa.table({"prompt": [f"prompt {i}" for i in range(20_000)]})
    pq.write_table(table, path, write_page_checksum=True, use_dictionary=False, compression="none")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def duplicated(path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["prompt", "prompt"]), path)


def encrypted(path: Path) -> None:
    parquet(path, example(3))
    path.write_bytes(b"PARE" + path.read_bytes()[4:-4] + b"PARE")


def cut(path: Path) -> None:
    path.write_bytes(parquet(path, example(3000)).read_bytes()[:-9])


def loop(path: Path) -> None:
    path.symlink_to(path)


BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("in.parquet", lambda path: None, "cannot be opened: No such file"),
    ("in.parquet", loop, "cannot be opened: Too many levels of symbolic links"),
    ("in.parquet", Path.mkdir, "is a folder without files; expected tables in it"),
    ("in.jsonl", os.mkfifo, "is a FIFO; expected a regular file"),
    ("in.parquet", Path.touch, "has no bytes"),
    ("in.csv", Path.touch, "has no bytes"),
    ("in.txt", lambda path: path.write_text("a"), "has the suffix '.txt'; expected one of .parquet"),
    ("in.parquet", lambda path: path.write_text("id,prompt\n1,a\n"), "cannot be read as Parquet: .*magic bytes"),
    ("in.parquet", cut, "cannot be read as Parquet"),
    ("in.parquet", encrypted, "is encrypted Parquet; decrypt it first"),
    ("in.parquet", flipped, "cannot be read as Parquet: .*CRC"),
    ("in.parquet", duplicated, "has 2 columns named 'prompt'; expected one"),
    ("in.csv", lambda path: path.write_text("a,a\n1,2\n"), "has 2 columns named 'a'; expected one"),
    ("in.csv", lambda path: path.write_text("a,b\n1,2\nsecret\n"), "Row #3: Expected 2 columns, got 1$"),
    ("in.csv", lambda path: path.write_bytes(b"a\xff,b\n1,2\n"), "cannot be read as CSV: .*utf-8"),
    ("in.jsonl", lambda path: path.write_text('{"a": 1}\n{"a": secret}\n'), "line 2 is not JSON at column 7"),
    ("cut.jsonl", lambda path: path.write_text('{"a": 1}\n{"a": \n'), "line 2 is not JSON at column 7"),
    ("in.jsonl", lambda path: path.write_text('{"a": 1}\n[1]\n'), "line 2 holds a list; expected an object"),
    ("in.jsonl", lambda path: path.write_text('{"a": ' + "[" * 200_000), "line 1 is not JSON"),
    ("in.jsonl", lambda path: path.write_text('{"a": "' + "x" * 5000), "line 1 is longer than 4096 bytes"),
]


@pytest.mark.parametrize(("name", "make", "said"), BAD)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Path], Any], said: str
) -> None:
    if "longer" in said:
        monkeypatch.setattr("batchinfer.jobs.tables.json_lines.MAX_LINE_BYTES", 4096)
    path = tmp_path / name
    make(path)
    with pytest.raises(Refused, match=said) as caught:
        list(Table.open([path]).batches(None, 1000))
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and "secret" not in message


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"id": ["1"], "prompt": ["a"]}, "column 'id' is string; expected int64, as in .*0.parquet; give it one type"),
        ({"id": [1], "prompt": [{"a": "b"}]}, "column 'prompt' is struct.*; expected string, as in .*0.parquet"),
    ],
)
def test_types_that_no_type_holds_together_are_refused(tmp_path: Path, second: dict[str, Any], said: str) -> None:
    paths = [
        parquet(tmp_path / f"{i}.parquet", pa.table(columns))
        for i, columns in enumerate([{"id": [1], "prompt": ["a"]}, second])
    ]
    with pytest.raises(Refused, match=said) as caught:
        Table.open(paths)
    assert str(caught.value).startswith(str(paths[1]))


def test_an_error_of_the_disk_is_no_fault_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "in.parquet", example(10))
    table = Table.open([path])

    def fail(path: Path, int96_unit: str) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("batchinfer.jobs.tables.parquet._open_parquet", fail)
    with pytest.raises(OSError, match="Input/output error"):
        list(table.batches(None, 10))
