"""Files whose columns differ are one table, as pyarrow's permissive promotion makes it; what is lost is refused."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stub_jobs import STUB, make_model, spec, write_json_lines

from batchinfer.errors import Refused
from batchinfer.jobs.job import run
from batchinfer.jobs.tables.json_lines import indices_not_text
from batchinfer.jobs.tables.table import Table

FAR = 2**53 + 1  # the first integer that is no double
DICTIONARY = pa.array(["x", "y", "x"]).dictionary_encode()


def files(folder: Path, *tables: pa.Table) -> list[Path]:
    paths = [folder / f"{i}.parquet" for i in range(len(tables))]
    for path, table in zip(paths, tables, strict=True):
        pq.write_table(table, path, row_group_size=2)
    return paths


def whole(table: Table, rows: int = 2) -> pa.Table:
    batches = [batch.replace_schema_metadata(None) for _, batch in table.batches(None, rows)]
    assert sum(map(len, batches)) == table.num_rows
    return pa.Table.from_batches(batches)


PAIRS: list[tuple[Any, Any]] = [
    (pa.nulls(3), pa.array(["a", None, "b"])),
    (pa.array([1, None, 3]), pa.array([1.5, None, 2.0])),
    (pa.array([1, 2, 3], pa.int8()), pa.array([1, 2, 3], pa.uint16())),
    (pa.array([Decimal("1.234")] * 3), pa.array([Decimal("12345.50")] * 3)),
    (pa.array(["a"] * 3), pa.array(["b"] * 3, pa.large_string())),
    (pa.array([1, 2, 3], pa.timestamp("us")), pa.array([1, 2, 3], pa.timestamp("ns"))),
    (pa.array([[1], None, []]), pa.array([[1.5], [None], None])),
    (pa.array([None, [], None], pa.list_(pa.null())), pa.array([["a"], [None], None])),
    (pa.array([{"a": 1}, None, {"a": 2}]), pa.array([{"a": 1.5, "b": ["c"]}, None, {"a": None, "b": None}])),
    (pa.nulls(3), DICTIONARY),
    (DICTIONARY.cast(pa.dictionary(pa.int8(), pa.string())), DICTIONARY),
    (pa.nulls(3), pa.array([[{"role": "user", "content": "a"}]] * 3)),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].type}, {pair[1].type}")
@pytest.mark.parametrize("turned", [False, True])
def test_columns_of_two_types_are_promoted_as_pyarrow_does(
    tmp_path: Path, pair: tuple[pa.Array, pa.Array], turned: bool
) -> None:
    tables = [pa.table({"prompt": ["a", "b", "c"], "x": column}) for column in (pair[::-1] if turned else pair)]
    paths = files(tmp_path, *tables)
    tables = [pq.read_table(path) for path in paths]
    ours = Table.open(paths)
    theirs = pa.concat_tables(tables, promote_options="permissive")
    assert whole(ours).equals(theirs) and ours.schema == theirs.schema
    changed = [table["x"].type != theirs["x"].type for table in tables]
    assert len(ours.notes) == sum(changed)
    for note, table in zip(ours.notes, (table for table, has in zip(tables, changed, strict=True) if has), strict=True):
        assert note.startswith(f"column 'x' is {table['x'].type} in {tmp_path}")
        assert f"and is read as {theirs['x'].type}, as in other files" in note


def test_columns_that_are_absent_are_null(tmp_path: Path) -> None:
    tables = [
        pa.table({"prompt": ["a", "b", "c"], "x": [1, 2, 3]}),
        pa.table({"y": [{"z": 1}], "prompt": ["d"]}),
        pa.table({"w": [0.5] * 5}),
    ]
    paths = files(tmp_path, *tables)
    ours = Table.open(paths)
    theirs = pa.concat_tables(tables, promote_options="permissive")
    assert whole(ours).equals(theirs) and ours.schema == theirs.schema
    shards = [whole(ours.shard(i, 3)) for i in range(3)]
    assert pa.concat_tables(shards).equals(theirs)
    columns = [pa.Table.from_batches([b for _, b in ours.batches([name], 4)]) for name in ours.schema.names]
    assert all(column.equals(theirs.select(column.column_names)) for column in columns)
    assert ours.notes[1] == f"column 'x' is absent in {paths[1]} and 1 more file, whose rows have null in it"


def test_a_column_may_be_null_only_where_a_file_says_so(tmp_path: Path) -> None:
    required, optional = (pa.schema([pa.field("prompt", pa.string(), nullable)]) for nullable in (False, True))
    tables = [pa.table({"prompt": ["a"]}, schema) for schema in (required, optional)]
    paths = files(tmp_path, *tables, pa.table({"x": [1]}))
    assert not Table.open(paths[:1]).schema.field("prompt").nullable
    assert Table.open(paths[:2]).schema.field("prompt").nullable
    assert Table.open([paths[0], paths[2]]).schema.field("prompt").nullable


@pytest.mark.parametrize(
    ("kept", "lost"),
    [
        (pa.array([0.5]), pa.array([FAR])),
        (pa.array([1], pa.timestamp("ns")), pa.array([2**60], pa.timestamp("us"))),
        (pa.array([1]), pa.array([2**64 - 1], pa.uint64())),
    ],
)
def test_a_value_that_the_common_type_cannot_hold_is_refused(tmp_path: Path, kept: pa.Array, lost: pa.Array) -> None:
    paths = files(tmp_path, pa.table({"prompt": ["a"], "x": kept}), pa.table({"prompt": ["b"], "x": lost}))
    said = rf"1\.parquet: column 'x' is {lost.type}, and a value of it does not fit {kept.type}, .*; give it one type"
    with pytest.raises(Refused, match=said.replace("[", r"\[").replace("]", r"\]")):
        Table.open(paths)


def test_json_lines_of_one_table_are_promoted_and_told(tmp_path: Path) -> None:
    rows: list[list[dict[str, Any]]] = [
        [{"id": 1, "prompt": "def a(", "note": None}, {"id": 2, "prompt": 7, "note": None}],
        [{"id": 3, "prompt": "def c(", "note": "x"}, {"id": 4, "prompt": "def d("}],
        [{"id": 5, "prompt": "def e("}],
        [{"id": 6.5, "prompt": "def f(", "note": "y"}],
    ]
    paths = [write_json_lines(tmp_path / f"{name}.jsonl", *each) for name, each in zip("abcd", rows, strict=True)]
    report = run(spec(make_model(tmp_path), *paths), STUB)
    out = pq.read_table(tmp_path / "out.parquet")
    assert out["id"].to_pylist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.5]
    assert out["note"].to_pylist() == [None, None, "x", None, None, "y"]
    assert out["error_code"].to_pylist() == [None, "wrong_type", None, None, None, None]
    assert [note.replace(f"{tmp_path}/", "") for note in report.notes[:3]] == [
        "column 'id' is int64 in a.jsonl and 2 more files, and is read as double, as in other files",
        "column 'note' is null in a.jsonl, and is read as string, as in other files",
        "column 'note' is absent in c.jsonl, whose rows have null in it",
    ]
    ((_, batch), *_) = Table.open(paths).batches(["prompt", "id"], 10)
    assert indices_not_text(batch, "prompt") == [1], "marked in a batch that was promoted too"


def test_formats_may_differ_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,by\na,b\n")
    write_json_lines(tmp_path / "b.jsonl", {"prompt": "c", "by": None})
    pq.write_table(pa.table({"prompt": pa.array(["d"], pa.large_string())}), tmp_path / "c.parquet")
    read = whole(Table.open([tmp_path / name for name in ("a.csv", "b.jsonl", "c.parquet")]))
    assert read.to_pylist() == [{"prompt": "a", "by": "b"}, {"prompt": "c", "by": None}, {"prompt": "d", "by": None}]


def test_columns_of_prompts_keep_what_each_row_wrote(tmp_path: Path) -> None:
    """A common type would write 1e+15 in one file's prompts because another file has 1.5."""
    lists = write_json_lines(tmp_path / "a.jsonl", {"x": [1, {"b": 1.0}]})
    floats = write_json_lines(tmp_path / "b.jsonl", {"x": 1.5})
    (whole_numbers,) = files(tmp_path, pa.table({"x": [10**15]}))
    paths = [whole_numbers, floats, lists]
    assert whole(Table.open(paths, verbatim=["x"]))["x"].to_pylist() == ["1000000000000000", "1.5", '[1, {"b": 1.0}]']
    assert whole(Table.open(paths[:2]))["x"].to_pylist() == [1e15, 1.5]
    assert Table.open([floats], verbatim=["x"]).schema.field("x").type == pa.float64()


def test_decimals_beside_floats_keep_their_digits_or_are_refused(tmp_path: Path) -> None:
    floats = pa.table({"x": [1.5]})
    short, long = (
        pa.table({"x": pa.array([Decimal(x)], pa.decimal128(22, 2))}) for x in ("0.10", "12345678901234567890.12")
    )
    assert whole(Table.open(files(tmp_path, short, floats)))["x"].to_pylist() == [0.1, 1.5]
    with pytest.raises(
        Refused, match=r"0.parquet: column 'x' is decimal128\(22, 2\), and a value .* does not fit double"
    ):
        Table.open(files(tmp_path, long, floats))
