"""What pandas and datasets note about columns in a schema's metadata: types that Arrow has not, and pandas' index.

Notes of other programs are left out: some list all columns, and their reader would not see those that the output adds.
"""

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pyarrow as pa

PANDAS, DATASETS = b"pandas", b"huggingface"  # the keys of their notes, which are JSON
# pandas' note that the columns' names are text.
_TEXT_NAMES = {
    "name": None,
    "field_name": None,
    "pandas_type": "unicode",
    "numpy_type": "object",
    "metadata": {"encoding": "UTF-8"},
}

Notes = dict[bytes, bytes]


def common_notes(schemas: Iterable[pa.Schema], without: Collection[str]) -> Notes:
    """Return what all schemas with notes say alike about columns, leaving out the columns in `without`."""
    all_notes = [schema.metadata or {} for schema in schemas]
    return _made(
        {
            PANDAS: lambda: _common_pandas(
                [json.loads(notes[PANDAS]) for notes in all_notes if PANDAS in notes], without
            ),
            DATASETS: lambda: _common_features(
                [json.loads(notes[DATASETS]) for notes in all_notes if DATASETS in notes], without
            ),
        }
    )


def with_notes(
    fields: Sequence[pa.Field], notes: Notes | None, num_rows: int | None = None, results: Sequence[pa.Field] = ()
) -> pa.Schema:
    """Return a schema of these fields and of `results` behind them, with the notes about the fields, and new notes
    about the results.

    pandas' index may be a range, which is kept if it is as long as `num_rows`.
    """
    names = [field.name for field in (*fields, *results)]
    given = notes or {}
    made = _made(
        {
            PANDAS: lambda: _pandas_about(names, json.loads(given[PANDAS]), num_rows, results),
            DATASETS: lambda: _features_about(names, json.loads(given[DATASETS]), results),
        }
    )
    return pa.schema([*fields, *results], made)


def _made(notes: dict[bytes, Callable[[], Any]]) -> Notes:
    """Return the notes as JSON, without those that are absent or are not as pandas and datasets write them."""
    found = {}
    for key, make in notes.items():
        try:
            found[key] = json.dumps(make()).encode()
        except (LookupError, ValueError, TypeError, AttributeError):
            continue
    return found


def _common_pandas(notes: list[dict[str, Any]], without: Collection[str]) -> dict[str, Any]:
    columns = _common([_by_name(each) for each in notes], without)
    index = [each for each in notes[0]["index_columns"] if all(each in other["index_columns"] for other in notes)]
    return {**notes[0], "columns": list(columns.values()), "index_columns": index}


def _common_features(notes: list[dict[str, Any]], without: Collection[str]) -> dict[str, Any]:
    return {"info": {"features": _common([each["info"]["features"] for each in notes], without)}}


def _common(notes: list[dict[str, Any]], without: Collection[str]) -> dict[str, Any]:
    """Return the first file's notes by column, without those that another file contradicts."""
    return {
        name: note
        for name, note in notes[0].items()
        if name not in without and all(other.get(name, note) == note for other in notes)
    }


def _pandas_about(
    names: list[str], notes: dict[str, Any], num_rows: int | None, results: Sequence[pa.Field]
) -> dict[str, Any]:
    known = {field.name: _pandas_note(field.name, field.type) for field in results} | _by_name(notes)
    columns = {name: known[name] for name in names if name in known}
    index = [
        each
        for each in notes["index_columns"]
        if (
            each in columns
            if isinstance(each, str)
            else len(range(each["start"], each["stop"], each["step"])) == num_rows
        )
    ]
    # Names that are numbers, or of several levels, cannot be told from text beside the names of results.
    levels = notes.get("column_indexes", [])
    of_text = len(levels) == 1 and levels[0]["pandas_type"] in ("unicode", "string")
    return {
        **notes,
        "columns": list(columns.values()),
        "index_columns": index,
        "column_indexes": levels if of_text else [_TEXT_NAMES],
    }


def _by_name(notes: dict[str, Any]) -> dict[str, Any]:
    return {each.get("field_name", each["name"]): each for each in notes["columns"]}


def _pandas_note(name: str, kind: pa.DataType) -> dict[str, Any]:
    types = {
        pa.string(): ("unicode", "object"),
        pa.bool_(): ("bool", "object"),  # with nulls
        **{t: (str(t), str(t)) for t in (pa.int32(), pa.int64())},
        pa.float64(): ("float64", "float64"),
    }
    pandas_type, numpy_type = types.get(kind, ("object", "object"))
    return {
        "name": name,
        "field_name": name,
        "pandas_type": pandas_type,
        "numpy_type": numpy_type,
        "metadata": None,
    }


def _features_about(names: list[str], notes: dict[str, Any], results: Sequence[pa.Field]) -> dict[str, Any]:
    known = {field.name: _feature(field.type) for field in results} | notes["info"]["features"]
    return {"info": {"features": {name: known[name] for name in names if name in known}}}


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """Return the note of datasets about a type of the results."""
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    return {"dtype": "float64" if pa.types.is_float64(kind) else str(kind), "_type": "Value"}
