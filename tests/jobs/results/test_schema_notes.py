"""Types that Parquet has not come back as they went in: pandas, polars and datasets read the output as their input."""

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stub_jobs import STUB, spec

from batchinfer.jobs.incremental import run_new_rows
from batchinfer.jobs.job import run
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.spec import sharded

WORDS = ["a", "b", "c", "d"]
RESULTS = ["generated_text", "finish_reason", "prompt_tokens", "completion_tokens", "error_code", "error_message"]


def outputs(model: Path, folder: Path, **fields: Any) -> dict[str, Path]:
    """The output of the files in `folder`/in by one run, by a merge of shards, and by a run that adds a file."""
    inputs = sorted((folder / "in").iterdir())
    run(spec(model, *inputs, output=folder / "out.parquet", **fields), STUB)
    shards = [sharded(folder / "out.parquet", i, 2) for i in range(2)]
    for i, output in enumerate(shards):
        run(spec(model, *inputs, output=output, shard=(i, 2), **fields), STUB)
    merge_shards(shards, folder / "merged.parquet", overwrite=False)
    growing = spec(model, *inputs, output=folder / "grown", incremental=True, id_column="prompt", **fields)
    run_new_rows(growing, lambda part: run(part, STUB))
    return {"one": folder / "out.parquet", "merged": folder / "merged.parquet", "grown": folder / "grown"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in" / "0.parquet"


def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "prompt": WORDS,
            "size": pd.Categorical(["mid", "hi", "lo", None], categories=["lo", "unused", "mid", "hi"], ordered=True),
            "kind": pd.Categorical(["z", "a", "z", "a"], categories=["z", "unused", "a"]),
            "large": pd.array([1, None, 2**60 + 1, 4], dtype="Int64"),
            "flag": pd.array([True, None, False, True], dtype="boolean"),
            "text": pd.array(["x", None, "y", "z"], dtype="string"),
        },
        index=pd.Index(list("uvwx"), name="key"),
    )


def test_pandas_reads_its_types_and_index_again(tmp_path: Path, model: Path, source: Path) -> None:
    frame().to_parquet(source, row_group_size=3)
    before = pd.read_parquet(source)
    for path in outputs(model, tmp_path).values():
        after = pd.read_parquet(path)
        assert list(after.columns) == [*before.columns, *RESULTS]
        pd.testing.assert_frame_equal(after[before.columns], before)
        assert list(after["size"].cat.categories) == ["lo", "unused", "mid", "hi"] and after["size"].cat.ordered
        assert list(after["generated_text"]) == WORDS and after["prompt_tokens"].dtype == "int32"


def test_pandas_reads_the_columns_that_are_kept(tmp_path: Path, model: Path, source: Path) -> None:
    frame().to_parquet(source)
    for name, path in outputs(model, tmp_path, columns=("prompt", "large")).items():
        after = pd.read_parquet(path)
        assert list(after.columns) == ["prompt", "large", *RESULTS], name
        assert after["large"].dtype == "Int64" and after["large"].iloc[2] == 2**60 + 1
        assert list(after.index) == [0, 1, 2, 3]
        noted = json.loads(pq.read_schema(path if path.is_file() else next(path.iterdir())).metadata[b"pandas"])
        assert [each["field_name"] for each in noted["columns"]] == ["prompt", "large", *RESULTS]


@pytest.mark.parametrize(
    "index",
    [
        pd.RangeIndex(10, 18, 2, name="n"),
        pd.MultiIndex.from_tuples([(1, "x"), (1, "y"), (2, "x"), (2, "y")], names=["n", None]),
        pd.date_range("2024-01-01", periods=4, tz="Europe/Berlin"),
    ],
    ids=["range", "levels", "dates"],
)
def test_an_index_of_any_kind_comes_back(tmp_path: Path, model: Path, source: Path, index: pd.Index) -> None:
    pd.DataFrame({"prompt": WORDS}, index=index).to_parquet(source)
    run(spec(model, source, output=tmp_path / "out.parquet"), STUB)
    pd.testing.assert_index_equal(pd.read_parquet(tmp_path / "out.parquet").index, pd.read_parquet(source).index)


def test_a_range_of_another_length_is_no_index(tmp_path: Path, model: Path, source: Path) -> None:
    pd.DataFrame({"prompt": WORDS}).to_parquet(source)
    pd.DataFrame({"prompt": [f"{word}2" for word in WORDS]}).to_parquet(source.with_name("1.parquet"))
    for path in outputs(model, tmp_path).values():
        assert list(pd.read_parquet(path).index) == list(range(8))


@pytest.mark.parametrize("names", [[0, 1], [("x", "a"), ("x", "b")]], ids=str)
def test_names_that_are_no_text_become_text(tmp_path: Path, model: Path, source: Path, names: list[Any]) -> None:
    columns = pd.MultiIndex.from_tuples(names) if isinstance(names[0], tuple) else pd.Index(names)
    pd.DataFrame([["a", 1], ["b", 2]], columns=columns).to_parquet(source)
    run(spec(model, source, output=tmp_path / "out.parquet", prompt_column=str(names[0])), STUB)
    assert list(pd.read_parquet(tmp_path / "out.parquet").columns) == [*map(str, names), *RESULTS]


def test_polars_reads_its_enums_again(tmp_path: Path, model: Path, source: Path) -> None:
    enum = pl.Enum(["z", "unused", "a"])
    before = pl.DataFrame(
        {
            "prompt": WORDS,
            "enum": pl.Series(["a", "z", None, "a"], dtype=enum),
            "enums": pl.Series([["a"], ["z", None], None, []], dtype=pl.List(enum)),
            "category": pl.Series(["q", None, "p", "q"], dtype=pl.Categorical),
            "array": pl.Series([[1, 2]] * 4, dtype=pl.Array(pl.Int32, 2)),
        }
    )
    before.write_parquet(source, row_group_size=2)
    for path in outputs(model, tmp_path).values():
        after = pl.read_parquet(path)
        assert after.columns == [*before.columns, *RESULTS]
        assert after.select(before.columns).equals(before) and after.schema["enum"] == enum
        assert after.schema["enums"] == pl.List(enum) and after.schema["category"] == pl.Categorical


def features() -> datasets.Features:
    kinds = datasets.ClassLabel(names=["neg", "pos"])
    return datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "label": kinds,
            "labels": datasets.List(kinds),
            "n": datasets.Value("int32"),
        }
    )


def labelled(path: Path, kept: datasets.Features, words: list[str] = WORDS) -> None:
    data = {"prompt": words, "label": [0, 1, 0, None], "labels": [[1], [], [0, 1], [0]], "n": range(4)}
    datasets.Dataset.from_dict({name: data[name] for name in kept}, features=kept).to_parquet(str(path))


@pytest.mark.parametrize("columns", [None, ("prompt", "labels")])
def test_datasets_reads_its_features_again(tmp_path: Path, model: Path, source: Path, columns: Any) -> None:
    labelled(source, features())
    for name, path in outputs(model, tmp_path, columns=columns, n=2).items():
        files = [str(file) for file in ([path] if path.is_file() else path.iterdir())]
        after = datasets.Dataset.from_parquet(files, cache_dir=str(tmp_path / "cache" / name))
        kept = {each: feature for each, feature in features().items() if columns is None or each in columns}
        assert {each: after.features[each] for each in kept} == kept
        assert after.column_names == [*kept, *RESULTS, "samples"]
        noted = json.loads(pq.read_schema(files[0]).metadata[b"huggingface"])["info"]["features"]
        assert datasets.Features.from_dict(noted) == after.features


def test_notes_that_files_contradict_are_left_out(tmp_path: Path, model: Path, source: Path) -> None:
    labelled(source, features())
    turned = features() | {"label": datasets.ClassLabel(names=["pos", "neg"])}
    labelled(source.with_name("1.parquet"), datasets.Features(turned), [f"{word}2" for word in WORDS])
    run(spec(model, *sorted(source.parent.iterdir()), output=tmp_path / "out.parquet"), STUB)
    after = datasets.Dataset.from_parquet(str(tmp_path / "out.parquet"), cache_dir=str(tmp_path / "cache"))
    assert after.features["label"] == datasets.Value("int64") and after.features["labels"] == features()["labels"]


def test_notes_of_a_promoted_column_are_left_out(tmp_path: Path, model: Path, source: Path) -> None:
    pd.DataFrame({"prompt": WORDS, "n": pd.array([1, None, 3, 4], dtype="Int64")}).to_parquet(source)
    pq.write_table(pa.table({"prompt": ["e"], "n": [0.5]}), source.with_name("1.parquet"))
    run(spec(model, *sorted(source.parent.iterdir()), output=tmp_path / "out.parquet"), STUB)
    assert pd.read_parquet(tmp_path / "out.parquet")["n"].dtype == "float64"


@pytest.mark.parametrize(
    "notes", [b"{", b"[]", b'{"columns": [1]}', b'{"info": null}', b'{"info": {"features": []}}', b"\xff"]
)
def test_notes_of_another_form_are_left_out(tmp_path: Path, model: Path, source: Path, notes: bytes) -> None:
    table = pa.table({"prompt": WORDS}).replace_schema_metadata({"pandas": notes, "huggingface": notes, "mine": "x"})
    pq.write_table(table, source)
    run(spec(model, source, output=tmp_path / "out.parquet"), STUB)
    assert pq.read_table(tmp_path / "out.parquet").column_names == ["prompt", *RESULTS]


def test_fields_keep_what_they_say(tmp_path: Path, model: Path, source: Path) -> None:
    inner = pa.struct([pa.field("a", pa.int64(), nullable=False, metadata={"unit": "s"}), pa.field("b", pa.string())])
    fields = [
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("n", pa.int64(), nullable=False, metadata={"unit": "m"}),
        pa.field("s", inner, metadata={"of": "struct"}),
    ]
    rows = [WORDS, [1, 2, 3, 4], [{"a": 1, "b": None}, None, {"a": 2, "b": "x"}, {"a": 3, "b": ""}]]
    pq.write_table(pa.table(rows, schema=pa.schema(fields)), source)
    for path in outputs(model, tmp_path).values():
        found = pq.read_schema(path if path.is_file() else next(path.iterdir()))
        for field in fields:
            assert found.field(field.name).equals(field, check_metadata=True)


def test_ordered_categories_of_two_files_stay_those_of_each(tmp_path: Path, model: Path, source: Path) -> None:
    kinds = [["lo", "hi"], ["lo", "mid", "hi"]]
    for i, names in enumerate(kinds):
        column = pd.Categorical([names[-1], names[-2]], categories=names, ordered=True)
        pd.DataFrame({"prompt": [f"{i}a", f"{i}b"], "k": column}).to_parquet(source.with_name(f"{i}.parquet"))
    run(spec(model, *sorted(source.parent.iterdir()), output=tmp_path / "out.parquet"), STUB)
    with pq.ParquetFile(tmp_path / "out.parquet") as file:
        groups = [file.read_row_group(i)["k"].chunk(0) for i in range(file.num_row_groups)]
    assert [group.dictionary.to_pylist() for group in groups] == kinds
    assert [value for group in groups for value in group.to_pylist()] == ["hi", "lo", "hi", "mid"]
