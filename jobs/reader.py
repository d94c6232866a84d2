"""Tables read as record batches in bounded memory: Parquet, JSON Lines and CSV, several files one after the other."""

import json
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from batchinfer.jobs.spec import Refused

BATCH_BYTES = 32 << 20  # a batch stops growing here, however few its rows
PIECE_ROWS = 128  # decoded at once, for a value may be large and repeated; batches are put together from such pieces
JSON_BLOCK_BYTES = 8 << 20  # of text, which takes several times that as objects
CSV_BLOCK_BYTES = 16 << 20  # a row must fit into one
MAX_LINE_BYTES = 256 << 20

# Metadata of a batch: for each column of text read from JSON, the places where the value was no text.
_NOT_TEXT = b"not_text"


@dataclass(frozen=True)
class Table:
    """Input files of one schema, as one table whose rows are numbered from 0 across the files."""

    paths: tuple[Path, ...]
    schema: pa.Schema
    num_rows: int
    skipped: int | None = None  # of a shard: rows of the files that come before its first

    @staticmethod
    def open(paths: Sequence[Path]) -> "Table":
        """Look at each file; JSON Lines and CSV are read through once, to know their columns and to count them.

        CSV columns are text. Raises `Refused` with one line naming file, column, what was found and expected.
        """
        schema, num_rows = pa.schema([]), 0
        for i, path in enumerate(paths):
            found, rows = _format_of(path).inspect(path)
            _check_names(path, found)
            if i == 0:
                schema = found
            else:
                _check_same(path, found, paths[0], schema)
            num_rows += rows
        return Table(tuple(paths), schema, num_rows)

    def shard(self, index: int, count: int) -> "Table":
        """The `index`-th of `count` runs of neighbouring rows, from 0, as a table of its own; they differ by a row."""
        first, end = (self.num_rows * i // count for i in (index, index + 1))
        return replace(self, num_rows=end - first, skipped=first)

    def check(self, columns: Sequence[str]) -> None:
        """Raises `Refused` naming file and column if one of them is not there."""
        for name in columns:
            find_field(self.schema, name, self.paths[0])

    def batches(self, columns: Sequence[str] | None, rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(ordinal of its first row, batch) of at most `rows` rows and about `BATCH_BYTES`, with these columns or all.

        Raises `Refused` where a file turns out to be damaged.
        """
        names = self.schema.names if columns is None else list(columns)
        self.check(names)
        first = -(self.skipped or 0)
        for path in self.paths:
            for batch in _format_of(path).read(path, self.schema, names, rows):
                if self.skipped is None:
                    yield first, batch
                elif first >= self.num_rows:
                    return
                elif first + batch.num_rows > 0:
                    start = max(0, -first)
                    yield first + start, _cut(batch, start, min(batch.num_rows, self.num_rows - first))
                first += batch.num_rows


def find_field(schema: pa.Schema, name: str, path: Path) -> pa.Field:
    """The field of this name. Raises `Refused` naming file, column and the columns that are there."""
    if name not in schema.names:
        raise Refused(f"{path} has no column {name!r}; its columns are {', '.join(map(repr, schema.names))}")
    return schema.field(name)


def places_not_text(batch: pa.RecordBatch, column: str) -> list[int]:
    """Where a column of text, read from JSON, held something else; the batch has its JSON there."""
    metadata = batch.schema.metadata or {}
    places: list[int] = json.loads(metadata.get(_NOT_TEXT, b"{}")).get(column, [])
    return places


def _cut(batch: pa.RecordBatch, start: int, end: int) -> pa.RecordBatch:
    """Rows `start` to before `end`."""
    cut = batch.slice(start, end - start)
    if (stored := (batch.schema.metadata or {}).get(_NOT_TEXT)) is None:
        return cut
    places = {name: [i - start for i in found if start <= i < end] for name, found in json.loads(stored).items()}
    return cut.replace_schema_metadata({_NOT_TEXT: json.dumps(places)})


class _Parquet:
    @staticmethod
    def inspect(path: Path) -> tuple[pa.Schema, int]:
        with _refusing(path, "Parquet"), _open_parquet(path) as file:
            metadata = file.metadata
            counted = sum(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
            if counted != metadata.num_rows:
                raise Refused(f"{path}: the footer counts {metadata.num_rows} rows, its row groups {counted}")
            return file.schema_arrow, counted

    @staticmethod
    def read(path: Path, schema: pa.Schema, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        with _refusing(path, "Parquet"), _open_parquet(path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            widest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
            piece_rows = min(rows, PIECE_ROWS, max(1, BATCH_BYTES // 4 // max(widest, 1)))
            pieces = file.iter_batches(piece_rows, columns=columns, use_threads=False)
            count = 0
            for batch in _grouped((piece.select(columns) for piece in pieces), rows):
                count += batch.num_rows
                yield batch
            if count != file.metadata.num_rows:
                raise Refused(f"{path}: the footer counts {file.metadata.num_rows} rows, its pages hold {count}")


def _open_parquet(path: Path) -> pq.ParquetFile:
    # Without pre-buffering and with small reads, memory does not grow with a row group.
    return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)


class _Csv:
    @staticmethod
    def inspect(path: Path) -> tuple[pa.Schema, int]:
        rows = 0
        with _refusing(path, "CSV"), _open_csv(path) as reader:
            for batch in reader:
                rows += batch.num_rows
            return pa.schema([(name, pa.string()) for name in reader.schema.names]), rows

    @staticmethod
    def read(path: Path, schema: pa.Schema, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        with _refusing(path, "CSV"), _open_csv(path, schema.names) as reader:
            step = min(rows, PIECE_ROWS)
            pieces = (batch.slice(i, step) for batch in reader for i in range(0, batch.num_rows, step))
            yield from _grouped((piece.select(columns) for piece in pieces), rows)


def _open_csv(path: Path, text_columns: Sequence[str] = ()) -> pa_csv.CSVStreamingReader:
    return pa_csv.open_csv(
        path,
        pa_csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES),
        pa_csv.ParseOptions(newlines_in_values=True),
        pa_csv.ConvertOptions(column_types=dict.fromkeys(text_columns, pa.string()), check_utf8=False),
    )


class _JsonLines:
    @staticmethod
    def inspect(path: Path) -> tuple[pa.Schema, int]:
        types: dict[str, pa.DataType] = {}
        count = 0
        with _refusing(path, "JSON Lines"):
            for objects in _json_blocks(path, PIECE_ROWS):
                count += len(objects)
                for name in dict.fromkeys(chain.from_iterable(objects)):
                    found = _json_type([item.get(name) for item in objects])
                    types[name] = _common_type(types.get(name, pa.null()), found)
        return pa.schema(types.items()), count

    @staticmethod
    def read(path: Path, schema: pa.Schema, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        fields = [schema.field(name) for name in columns]
        with _refusing(path, "JSON Lines"):
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


_Format = type[_Parquet] | type[_Csv] | type[_JsonLines]
_FORMATS: dict[str, _Format] = {
    ".parquet": _Parquet,
    ".pq": _Parquet,
    ".jsonl": _JsonLines,
    ".ndjson": _JsonLines,
    ".csv": _Csv,
}


def _format_of(path: Path) -> _Format:
    try:
        status = path.stat()
    except OSError as error:
        raise Refused(f"{path} cannot be opened: {error.strerror}; expected a file") from error
    kinds = {stat.S_ISDIR: "a directory", stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket"}
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in kinds.items() if test(status.st_mode)), "a device")
        raise Refused(f"{path} is {kind}; expected a file, which can be read more than once")
    if status.st_size == 0:
        raise Refused(f"{path} has no bytes; a table without rows still has its column names")
    if path.suffix.lower() not in _FORMATS:
        raise Refused(f"{path} has the suffix {path.suffix!r}; expected one of {', '.join(_FORMATS)}")
    return _FORMATS[path.suffix.lower()]


def _grouped(pieces: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Pieces put together to batches of at most `rows` rows, each cut off once it has `BATCH_BYTES`."""
    held: list[pa.RecordBatch] = []
    count = size = 0
    for piece in pieces:
        if held and (count + piece.num_rows > rows or size >= BATCH_BYTES):
            yield pa.concat_batches(held)
            held, count, size = [], 0, 0
        held.append(piece)
        count += piece.num_rows
        size += piece.nbytes
    if held:
        yield pa.concat_batches(held)


def _check_names(path: Path, schema: pa.Schema) -> None:
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise Refused(f"{path} has {schema.names.count(name)} columns named {name!r}; expected one")


def _check_same(path: Path, found: pa.Schema, first: Path, expected: pa.Schema) -> None:
    for name in found.names:
        if name not in expected.names:
            raise Refused(f"{path} has a column {name!r}, which {first} has not; all inputs need the same columns")
    for field in expected:
        other = find_field(found, field.name, path)
        if other.type != field.type:
            raise Refused(f"{path}: column {field.name!r} is {other.type}; expected {field.type}, as in {first}")


@contextmanager
def _refusing(path: Path, kind: str) -> Iterator[None]:
    """Damage becomes `Refused`; a true error of the system stays an `OSError`, with its number."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, PermissionError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        # A malformed row of CSV is quoted there; its number is enough.
        reason = re.sub(r"(, got \d+): .*", r"\1", reason)
        raise Refused(f"{path} cannot be read as {kind}: {reason}") from error
