"""JSON Lines as record batches; values that a column cannot hold are kept as their JSON, and told."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.errors import Refused
from batchinfer.jobs.tables.batches import PIECE_ROWS, refusing

JSON_BLOCK_BYTES = 8 << 20  # of text, which takes several times that as objects
MAX_LINE_BYTES = 256 << 20

DEEPEST = 500  # objects and lists within each other, in a line
DEEPEST_TYPE = 32  # of a column; deeper values are kept as JSON

_UNFIT = (pa.ArrowException, UnicodeEncodeError, OverflowError)  # what pyarrow raises where a value has another type

# Metadata of a batch: for each column of text read from JSON, the places where the value was no text.
_NOT_TEXT = b"not_text"


class JsonLines:
    @staticmethod
    def inspect(path: Path) -> tuple[pa.Schema, int]:
        types: dict[str, pa.DataType] = {}
        count, promoted = 0, set()
        with refusing(path, "JSON Lines"):
            for objects in _json_blocks(path, PIECE_ROWS):
                count += len(objects)
                for name in dict.fromkeys(chain.from_iterable(objects)):
                    _check_name(path, name)
                    kinds = types.get(name, pa.null()), _json_type([item.get(name) for item in objects])
                    types[name] = _common_type(*kinds)
                    if set(kinds) - {types[name], pa.null()} and types[name] != pa.string():
                        promoted.add(name)
            if promoted:
                types |= dict.fromkeys(_misfits(path, {name: types[name] for name in promoted}), pa.string())
        return pa.schema(types.items()), count

    @staticmethod
    def read(path: Path, schema: pa.Schema, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        fields = [schema.field(name) for name in columns]
        with refusing(path, "JSON Lines"):
            for objects in _json_blocks(path, rows):
                not_text: dict[str, list[int]] = {}
                arrays = [_json_array([item.get(f.name) for item in objects], f, not_text) for f in fields]
                objects.clear()
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
                value = _parse(line)
            except (ValueError, RecursionError) as error:
                where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                told = f": {error}" if isinstance(error, _NoRow) else ""
                raise Refused(f"{path}: line {number} is not JSON{where}; expected one object a line{told}") from error
            if not isinstance(value, dict):
                raise Refused(f"{path}: line {number} holds a {type(value).__name__}; expected an object")
            objects.append(value)
            size += len(line)
            del line, value  # they may be large, and while the block is at work nothing else holds them
            if len(objects) == rows or size >= JSON_BLOCK_BYTES:
                yield objects
                objects, size = [], 0
    if objects:
        yield objects


def _check_name(path: Path, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise Refused(f"{path}: the name of a column is not UTF-8: {name!a}") from None


class _NoRow(ValueError):
    """JSON that is no row. The text holds nothing of the line."""


def _parse(line: bytes) -> Any:
    # Bytes that are no UTF-8 come out as lone surrogates: an error of that row alone, later.
    value = json.loads(line.decode("utf-8", "surrogateescape"), object_pairs_hook=_object)
    if line.count(b"[") + line.count(b"{") > DEEPEST and _nesting(value) > DEEPEST:
        raise _NoRow(f"its values are nested deeper than {DEEPEST}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _NoRow("a key is there twice")
    return made


def _nesting(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inside = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = list(chain.from_iterable(inside))
    return depth


def _misfits(path: Path, types: dict[str, pa.DataType]) -> set[str]:
    """Columns of types that became wider on the way, where some value does not fit: numbers beyond 2**53 as floats."""
    found: set[str] = set()
    for objects in _json_blocks(path, PIECE_ROWS):
        for name in types.keys() - found:
            try:
                pa.array([item.get(name) for item in objects], types[name])
            except _UNFIT:
                found.add(name)
    return found


def _json_type(values: list[Any]) -> pa.DataType:
    try:
        found = pa.array(values).type
    except _UNFIT:
        return pa.string()  # mixed: as JSON text
    # Parquet cannot hold an object without fields, and nothing reads what is nested without end.
    return pa.string() if "struct<>" in str(found) or _depth(found) > DEEPEST_TYPE else found


def _depth(kind: pa.DataType) -> int:
    return 1 + max((_depth(kind.field(i).type) for i in range(kind.num_fields)), default=0)


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
