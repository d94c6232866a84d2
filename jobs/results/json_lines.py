"""Outputs in JSON Lines: each row is one object on a line of its own, in UTF-8, with the columns as keys, in order.

Lists and structs become JSON's lists and objects. A map becomes a list of {"key": ..., "value": ...}, since its keys
need not be text. Values that JSON has no form for are written like this:

- NaN and infinities: null
- decimals: text with all digits, since readers would take a number for a float
- dates and times: text by ISO 8601, like 2024-05-17, 08:30:00.250 or 2024-05-17T08:30:00; with a time zone, the same
  moment in UTC, like 2024-05-17T06:30:00Z. If a year has more than five digits: a text with the stored number
- bytes: text in Base64
- UUIDs, and JSON text within lists and structs: text
- a column of JSON text: the values in it; what is no JSON, has a key twice or holds NaN remains text

Integers keep all their digits, beyond 2**53 too. Columns of other types, like durations and unions, are refused.
"""

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.errors import Refused
from batchinfer.host.files import keys_once
from batchinfer.jobs.results.schema import COUNTED, SAMPLES, result_fields

SLICE_ROWS = 1024  # most rows that are Python objects at a time
SLICE_BYTES = 1 << 22  # most bytes of them
BLOCK_BYTES = 1 << 20  # bytes that are written or copied at a time
DEEPEST = 100  # most levels of lists and structs within each other

_ESCAPED = re.compile(rb'["\\\x00-\x1f]')  # JSON escapes these bytes, which are never part of a longer character


class JsonLines:
    """The format JSON Lines. It keeps the values of a table but not their types, as described above."""

    @staticmethod
    def refuse_unfit(schema: pa.Schema) -> None:
        for field in schema:
            try:
                as_json_has_it(pa.nulls(0, field.type))
            except _UnfitError as error:
                within = "" if str(error) == str(field.type) else f" (in {field.type})"
                raise Refused(
                    f"column {field.name!r} is {error}{within}, which JSON Lines cannot hold; name the columns to keep "
                    "with --columns, or choose an output that ends in .parquet"
                ) from error

    @staticmethod
    @contextmanager
    def open(file: pa.NativeFile, schema: pa.Schema) -> Iterator["_Lines"]:
        with pa.BufferedOutputStream(file, BLOCK_BYTES) as buffered:
            yield _Lines(buffered)

    @staticmethod
    def schema(path: Path) -> pa.Schema:
        return pa.schema([])

    @staticmethod
    def slices(path: Path) -> Iterator[memoryview]:
        with path.open("rb") as file:
            while data := file.read(BLOCK_BYTES):
                yield memoryview(data)

    @staticmethod
    def results(path: Path) -> Iterator[pa.Table]:
        types = {field.name: field.type for field in result_fields(True)}
        with path.open("rb") as file:
            number = 0
            while rows := [_counted(path, number + i, line) for i, line in enumerate(islice(file, SLICE_ROWS), 1)]:
                try:
                    yield pa.table({name: pa.array([row[name] for row in rows], types[name]) for name in rows[0]})
                except (pa.ArrowException, KeyError) as error:
                    where = f"lines {number + 1} to {number + len(rows)}"
                    raise Refused(f"{path} is damaged: results in {where}: {error}") from error
                number += len(rows)


def _counted(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """Return the values of a row that are counted."""
    try:
        row = json.loads(line)
        counted = {name: row[name] for name in COUNTED}
        if next(reversed(row)) == SAMPLES:
            tokens = "completion_tokens"
            counted[SAMPLES] = row[SAMPLES] and [{tokens: one[tokens]} for one in row[SAMPLES]]
        return counted
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Refused(f"{path} is damaged: line {number} is not a row of an output: {error}") from error


class _Lines:
    def __init__(self, file: pa.NativeFile) -> None:
        self._write = file.write
        self._encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode

    def write(self, rows: pa.Table | memoryview) -> None:
        if isinstance(rows, memoryview):
            self._write(rows)
            return
        slice_rows = SLICE_BYTES * len(rows) // max(1, rows.nbytes)
        for batch in rows.to_batches(max(1, min(SLICE_ROWS, slice_rows))):
            columns = [as_json_has_it(column) for column in batch.columns]
            of_json = {field.name for field in batch.schema if isinstance(field.type, pa.JsonType)}
            if slice_rows:
                for row in zip(*(column.to_pylist() for column in columns), strict=True):
                    self._write(self._encode_row(dict(zip(rows.column_names, row, strict=True)), of_json).encode())
                    self._write(b"\n")
            else:
                self._write_large(dict(zip(rows.column_names, columns, strict=True)), of_json)

    def _encode_row(self, row: dict[str, Any], of_json: set[str]) -> str:
        if not of_json:
            return self._encode(row)
        items = ((name, (self._encode_json if name in of_json else self._encode)(row[name])) for name in row)
        return "{" + ",".join(f"{self._encode(name)}:{value}" for name, value in items) + "}"

    def _encode_json(self, text: str | None) -> str:
        try:
            written = self._encode(text if text is None else json.loads(text, object_pairs_hook=keys_once))
            written.encode()
        except (ValueError, RecursionError):  # also if it escapes half of a surrogate pair
            return self._encode(text)
        return written

    def _write_large(self, row: dict[str, pa.Array], of_json: set[str]) -> None:
        """Write one large row, its text block by block: as a Python object it would take up to nine times its bytes."""
        before = "{"
        for name, value in row.items():
            self._write(f"{before}{self._encode(name)}:".encode())
            if name in of_json:
                self._write(self._encode_json(value[0].as_py()).encode())
            elif not value.null_count and any(is_one(value.type) for is_one in _TEXT):
                text = _bytes_of(value)
                self._write(b'"')
                for first in range(0, len(text), BLOCK_BYTES):
                    self._write(_ESCAPED.sub(self._escape, text[first : first + BLOCK_BYTES]))
                self._write(b'"')
            else:
                self._write(self._encode(value[0].as_py()).encode())
            before = ","
        self._write(b"}\n")

    def _escape(self, found: re.Match[bytes]) -> bytes:
        return self._encode(found[0].decode())[1:-1].encode()


def _bytes_of(text: pa.Array) -> memoryview:
    """Return the bytes of the first value of a text array, without a copy."""
    large = text.cast(pa.large_string())
    _, offsets, data = large.buffers()
    first, end = np.frombuffer(offsets, np.int64)[large.offset : large.offset + 2]
    return memoryview(data or b"")[first:end]  # an array of empty texts may have no buffer


class _UnfitError(Exception):
    """Names the type, or the part of a type, that JSON has no form for."""


_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BYTES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)


def as_json_has_it(array: pa.Array, depth: int = 0) -> pa.Array:
    """Convert values to types that JSON has a form for. Raises `_UnfitError` if the type, not a value, has none."""
    kind, types = array.type, pa.types
    if depth > DEEPEST:
        raise _UnfitError(f"nested deeper than {DEEPEST}")
    if types.is_dictionary(kind):
        return as_json_has_it(array.dictionary_decode(), depth)
    if isinstance(kind, pa.JsonType):
        return as_json_has_it(array.storage)
    if isinstance(kind, pa.UuidType):
        return pa.array([value and str(value) for value in array.to_pylist()], pa.string())
    if types.is_map(kind):
        entry = pa.struct([("key", kind.key_type), ("value", kind.item_type)])
        return as_json_has_it(array.cast(pa.list_(entry)), depth)
    if types.is_struct(kind):
        names = [field.name for field in kind]
        if len(set(names)) < len(names):
            raise _UnfitError("a struct with two fields of the same name")
        children = [as_json_has_it(child, depth + 1) for child in array.flatten()]
        return pa.StructArray.from_arrays(children, names, mask=array.is_null())
    if any(is_one(kind) for is_one in _LISTS):
        offsets = np.append(0, np.cumsum(pc.fill_null(pc.list_value_length(array), 0).to_numpy(False)))
        values = as_json_has_it(pc.list_flatten(array), depth + 1)
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values, mask=array.is_null())
    return _leaf(array)


def _leaf(array: pa.Array) -> pa.Array:
    kind, types = array.type, pa.types
    if types.is_null(kind) or types.is_boolean(kind) or types.is_integer(kind):
        return array
    if types.is_floating(kind):
        return pc.if_else(pc.is_finite(array), array.cast(pa.float64()), None)
    if any(is_one(kind) for is_one in _TEXT):
        return array
    if types.is_date(kind) or types.is_time(kind) or types.is_decimal(kind):
        return array.cast(pa.string())
    if types.is_timestamp(kind):
        moments = array if kind.tz is None else array.cast(pa.timestamp(kind.unit, "UTC"))
        return pc.replace_substring(moments.cast(pa.string()), " ", "T")
    if any(is_one(kind) for is_one in _BYTES):
        values = array.to_pylist()
        return pa.array([v if v is None else base64.b64encode(v).decode() for v in values], pa.large_string())
    raise _UnfitError(str(kind))
