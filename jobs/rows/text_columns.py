"""Columns of text: which types they may have, and the good texts in them; or the rows' errors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from batchinfer.engine.prompts import Errors, size_errors
from batchinfer.engine.request import RowError
from batchinfer.errors import Refused
from batchinfer.jobs.tables.ids import as_text
from batchinfer.jobs.tables.table import find_field


def text_column(batch: pa.RecordBatch, name: str, errors: Errors) -> pa.Array:
    """Return the column as large_string, with null for each row that has an error. New errors are added to `errors`."""
    column = as_text(batch.column(name))
    for index in np.flatnonzero(column.is_null()).tolist():
        errors.setdefault(index, RowError("null_prompt", f"column {name!r} is null"))
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        for index, value in enumerate(column.cast(pa.large_binary())):
            try:
                str(value.as_py() or b"", "utf-8")
            except UnicodeDecodeError:
                errors.setdefault(index, invalid_utf8(name))
    if not errors:
        return column
    bad = np.zeros(len(column), np.bool_)
    bad[list(errors)] = True
    return pc.if_else(pa.array(bad), pa.scalar(None, pa.large_string()), column)


def good_texts(column: pa.Array, errors: Errors) -> tuple[NDArray[np.int64], list[str]]:
    """Return (indices, texts) of values that are not null, empty or too large; adds errors for empty and too large
    ones."""
    sizes = pc.fill_null(pc.binary_length(column), 0).to_numpy()
    for index, error in size_errors(sizes).items():
        errors.setdefault(index, error)
    indices = np.arange(len(column))
    if errors:
        indices = np.delete(indices, list(errors))
        column = column.take(pa.array(indices))
    return indices, column.to_pylist()


def invalid_utf8(name: str) -> RowError:
    return RowError("invalid_utf8", f"column {name!r} is not UTF-8")


def check_types(
    file: Path, schema: pa.Schema, names: list[str], fits: Callable[[pa.DataType], bool], expected: str
) -> None:
    """Raise `Refused`, naming file and column, if a column is missing or its type does not fit."""
    for name in names:
        found = find_field(schema, name, file).type
        if not fits(found):
            raise Refused(f"{file}: column {name!r} is {found}; expected {expected}")


def is_text(t: pa.DataType) -> bool:
    """Return whether a type is of text; JSON is text, and so is a column of nulls."""
    if pa.types.is_dictionary(t):
        return is_text(t.value_type)
    if isinstance(t, pa.JsonType):
        return True
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(t) for test in tests)
