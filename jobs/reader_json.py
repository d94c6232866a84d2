"""JSON Lines as record batches; values that a column cannot hold are kept as their JSON, and told."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.jobs.batches import PIECE_ROWS, refusing
from batchinfer.jobs.spec import Refused

JSON_BLOCK_BYTES = 8 << 20  # of text, which takes several times that as objects
MAX_LINE_BYTES = 256 << 20

# Metadata of a batch: for each column of text read from JSON, the places where the value was no text.
_NOT_TEXT = b"not_text"


class JsonLines:
    @staticmethod
    def inspect(path: Path) -> tuple[pa.Schema, int]:
        types: dict[str, pa.DataType] = {}
        count = 0
        with refusing(path, "JSON Lines"):
            for objects in _json_blocks(path, PIECE_ROWS):
                count += len(objects)
                for name in dict.fromkeys(chain.from_iterable(objects)):
                    found = _json_type([item.get(name) for item in objects])
                    types[name] = _common_type(types.get(name, pa.null()), found)
        return pa.schema(types.items()), count

    @staticmethod
    def read(path: Path, schema: pa.Schema, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        fields = [schema.field(name) for name in columns]
        with refusing(path, "JSON Lines"):
            for objects in _json_blocks(path, rows):
                not_text: dict[str, list[int]] = {}
                arrays = [_json_array([item.get(f.name) for item in objects], f, not_text) for f in fields]
                yield pa.record_batch(arrays, pa.schema(fields, {_NOT_TEXT: json.dumps(not_text)}))


def _json_blocks(path: Path, rows: int) -> Iterator[list[dict[str, Any]]]:
    objects, size = [], 0
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES:
                raise Refused(f"{path}: line {number} is longer than {MAX_LINE_BYTES} bytes")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.isspace() or not line:
                continue
            try:
                # Bytes that are no UTF-8 come out as lone surrogates: an error of that row alone, later.
                value = json.loads(line.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError) as error:
                where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                raise Refused(f"{path}: line {number} is not JSON{where}; expected one object a line") from error
            if not isinstance(value, dict):
                raise Refused(f"{path}: line {number} holds a {type(value).__name__}; expected an object")
            objects.append(value)
            size += len(line)
            if len(objects) == rows or size >= JSON_BLOCK_BYTES:
                yield objects
                objects, size = [], 0
    if objects:
        yield objects


def _json_type(values: list[Any]) -> pa.DataType:
    try:
        found = pa.array(values).type
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return pa.string()  # mixed: as JSON text
    # Parquet cannot hold an object without fields.
    return pa.string() if "struct<>" in str(found) else found


def _common_type(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    try:
        both = pa.unify_schemas([pa.schema([("x", a)]), pa.schema([("x", b)])], promote_options="permissive")
    except pa.ArrowException:
        return pa.string()
    return both.field("x").type


def _json_array(values: list[Any], field: pa.Field, not_text: dict[str, list[int]]) -> pa.Array:
    if field.type != pa.string():
        return pa.array(values, field.type)
    not_text[field.name] = [i for i, value in enumerate(values) if value is not None and not isinstance(value, str)]
    for i in not_text[field.name]:
        values[i] = json.dumps(values[i])
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        raw = pa.array([v if v is None else v.encode("utf-8", "surrogatepass") for v in values], pa.binary())
        return pc.cast(raw, options=pc.CastOptions(pa.string(), allow_invalid_utf8=True))


def places_not_text(batch: pa.RecordBatch, column: str) -> list[int]:
    """Where a column of text, read from JSON, held something else; the batch has its JSON there."""
    metadata = batch.schema.metadata or {}
    places: list[int] = json.loads(metadata.get(_NOT_TEXT, b"{}")).get(column, [])
    return places


def cut(batch: pa.RecordBatch, start: int, end: int) -> pa.RecordBatch:
    """Rows `start` to before `end`."""
    cut = batch.slice(start, end - start)
    if (stored := (batch.schema.metadata or {}).get(_NOT_TEXT)) is None:
        return cut
    places = {name: [i - start for i in found if start <= i < end] for name, found in json.loads(stored).items()}
    return cut.replace_schema_metadata({_NOT_TEXT: json.dumps(places)})
