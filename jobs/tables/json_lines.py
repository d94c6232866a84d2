"""Reading JSON Lines as record batches. A text column keeps values that are not text as JSON, and lists their rows."""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from batchinfer.errors import Refused
from batchinfer.host.files import KeyTwice, keys_once
from batchinfer.jobs.tables.batches import SLICE_ROWS, refusing

JSON_BLOCK_BYTES = 8 << 20  # bytes of text in a block; as Python objects they take several times as much
MAX_LINE_BYTES = 256 << 20

DEEPEST = 500  # most levels of objects and lists in a line
DEEPEST_TYPE = 32  # most levels of a column's type; deeper values are kept as JSON

_UNFIT = (pa.ArrowException, UnicodeEncodeError, OverflowError)  # raised by pyarrow if a value does not fit the type

_HALF_PAIR = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # the other surrogates stand for bytes that are not UTF-8

# Key of a batch's metadata: for each text column read from JSON, the indices of values that were not text.
_NOT_TEXT = b"not_text"


@dataclass(frozen=True)
class JsonLines:
    """The format JSON Lines: one object on each line.

    A common type would change values: an object would get the keys of other rows' objects, and 3 become 3.0 beside 1.5.
    The columns in `verbatim` keep each row's value as that row wrote it: lists and objects as JSON (`arrow.json`), and
    values of several types as text.
    """

    verbatim: Collection[str] = ()

    def inspect(self, path: Path) -> tuple[pa.Schema, int]:
        types: dict[str, pa.DataType] = {}
        count, promoted = 0, set()
        with refusing(path, "JSON Lines"):
            for objects in _json_blocks(path, SLICE_ROWS):
                count += len(objects)
                for name in dict.fromkeys(chain.from_iterable(objects)):
                    _check_name(path, name)
                    type_of = _verbatim_type if name in self.verbatim else _json_type
                    kinds = types.get(name, pa.null()), type_of([item.get(name) for item in objects])
                    types[name] = _common_type(*kinds)
                    if set(kinds) - {types[name], pa.null()} and types[name] != pa.string():
                        promoted.add(name)
            if promoted:
                own = promoted.intersection(self.verbatim)
                misfits = _misfits(path, {name: types[name] for name in promoted - own})
                types |= dict.fromkeys(own | misfits, pa.string())
        return pa.schema(types.items()), count

    def read(self, path: Path, schema: pa.Schema, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        fields = [schema.field(name) for name in columns]
        with refusing(path, "JSON Lines"):
            for objects in _json_blocks(path, rows):
                not_text: dict[str, list[int]] = {}
                arrays = [
                    _json_array([item.get(f.name) for item in objects], f, not_text, f.name in self.verbatim)
                    for f in fields
                ]
                objects.clear()
                yield pa.record_batch(arrays, pa.schema(fields, {_NOT_TEXT: json.dumps(not_text)}))


def _json_blocks(path: Path, rows: int) -> Iterator[list[dict[str, Any]]]:
    objects, size = [], 0
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES:
                raise Refused(f"{path}: line {number} is longer than {MAX_LINE_BYTES} bytes; shorten its values")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.isspace() or not line:
                continue
            try:
                value = parse(line.rstrip(b"\r\n"))
            except (ValueError, RecursionError) as error:
                where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                told = f": {error}" if isinstance(error, KeyTwice | _NestedTooDeep) else ""
                raise Refused(
                    f"{path}: line {number} is not JSON{where}; expected one object on each line{told}"
                ) from error
            if not isinstance(value, dict):
                raise Refused(f"{path}: line {number} holds a {type(value).__name__}; expected an object")
            objects.append(value)
            size += len(line)
            del line, value  # they may be large; free them while the caller works on the block
            if len(objects) == rows or size >= JSON_BLOCK_BYTES:
                yield objects
                objects, size = [], 0
    if objects:
        yield objects


def _check_name(path: Path, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise Refused(f"{path}: the name of a column is not UTF-8: {name!a}; rename it") from None


class _NestedTooDeep(ValueError):
    """A line's values are nested too deep. The message quotes nothing of the line."""


def parse(line: bytes) -> Any:
    """Return the JSON value on a line. Raises `ValueError` and `RecursionError` for anything else."""
    # Bytes that are not UTF-8 become lone surrogates, which later are an error of that row alone.
    value = json.loads(line.decode("utf-8", "surrogateescape"), object_pairs_hook=keys_once)
    if line.count(b"[") + line.count(b"{") > DEEPEST and _nesting(value) > DEEPEST:
        raise _NestedTooDeep(f"its values are nested more than {DEEPEST} levels deep")
    return value


def _nesting(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inside = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = list(chain.from_iterable(inside))
    return depth


def _misfits(path: Path, types: dict[str, pa.DataType]) -> set[str]:
    """Return the columns with a value that does not fit the type found for the whole file.

    For instance, integers beyond 2**53 do not fit a column that is of floats because of other rows.
    """
    found: set[str] = set()
    for objects in _json_blocks(path, SLICE_ROWS):
        for name in types.keys() - found:
            try:
                pa.array([item.get(name) for item in objects], types[name])
            except _UNFIT:
                found.add(name)
    return found


def _verbatim_type(values: list[Any]) -> pa.DataType:
    """Return the type that keeps these values as they are; text for values of several types."""
    kinds = {list if isinstance(value, dict) else type(value) for value in values if value is not None}
    if len(kinds) > 1:
        return pa.string()
    return pa.json_() if kinds == {list} else _json_type(values)


def _json_type(values: list[Any]) -> pa.DataType:
    try:
        found = pa.array(values).type
    except _UNFIT:
        return pa.string()  # values of several types are kept as JSON text
    # Parquet cannot hold an object without fields, and readers fail on very deep types.
    return pa.string() if "struct<>" in str(found) or _depth(found) > DEEPEST_TYPE else found


def _depth(kind: pa.DataType) -> int:
    return 1 + max((_depth(kind.field(i).type) for i in range(kind.num_fields)), default=0)


def _common_type(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    try:
        both = pa.unify_schemas([pa.schema([("x", a)]), pa.schema([("x", b)])], promote_options="permissive")
    except pa.ArrowException:
        return pa.string()
    return both.field("x").type


def _json_array(values: list[Any], field: pa.Field, not_text: dict[str, list[int]], verbatim: bool) -> pa.Array:
    if isinstance(field.type, pa.JsonType):
        texts = pa.array([value if value is None else _json_text(value) for value in values], pa.string())
        return pa.ExtensionArray.from_storage(field.type, texts)
    if field.type != pa.string():
        return pa.array(values, field.type)
    not_text[field.name] = [i for i, value in enumerate(values) if value is not None and not isinstance(value, str)]
    for i in not_text[field.name]:
        number = verbatim and isinstance(values[i], float)  # has the text that it has in a column of numbers
        values[i] = pa.scalar(values[i]).cast(pa.string()).as_py() if number else _json_text(values[i])
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        raw = pa.array([v if v is None else _bytes_of(v) for v in values], pa.binary())
        return pc.cast(raw, options=pc.CastOptions(pa.string(), allow_invalid_utf8=True))


def _bytes_of(text: str) -> bytes:
    """Return UTF-8 with the line's own bytes where it was not UTF-8, and a byte FF for half of a surrogate pair."""
    return _HALF_PAIR.sub("\udcff", text).encode("utf-8", "surrogateescape")


def _json_text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)  # has lone surrogates, which only escapes can hold
    return text


def indices_not_text(batch: pa.RecordBatch, column: str) -> list[int]:
    """Return the indices at which a text column, read from JSON, has other values than text. The batch has their
    JSON."""
    metadata = batch.schema.metadata or {}
    indices: list[int] = json.loads(metadata.get(_NOT_TEXT, b"{}")).get(column, [])
    return indices


def cut(batch: pa.RecordBatch, start: int, end: int) -> pa.RecordBatch:
    """Return rows `start` to `end - 1` of a batch, with its metadata adjusted."""
    rows = np.arange(len(batch))
    return only(batch, (start <= rows) & (rows < end))


def only(batch: pa.RecordBatch, chosen: NDArray[np.bool_]) -> pa.RecordBatch:
    """Return the chosen rows of a batch [rows], with its metadata adjusted."""
    # pyarrow filters no string views, so neighbours that are chosen are cut out and joined.
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False)).reshape(-1, 2)
    runs = [batch.slice(start, end - start) for start, end in edges.tolist()]
    kept = pa.concat_batches(runs) if len(runs) > 1 else runs[0] if runs else batch.slice(0, 0)
    if (stored := (batch.schema.metadata or {}).get(_NOT_TEXT)) is None:
        return kept
    places = np.cumsum(chosen) - 1
    indices = {name: [int(places[i]) for i in found if chosen[i]] for name, found in json.loads(stored).items()}
    return kept.replace_schema_metadata({_NOT_TEXT: json.dumps(indices)})
