"""Tables read as record batches in bounded memory, whatever the format; several files are one after the other."""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.tables.csv import Csv
from batchinfer.jobs.tables.json_lines import JsonLines, cut
from batchinfer.jobs.tables.parquet import Parquet

MAX_ROWS = 1 << 31  # some bytes of memory a row: its being done, the hash of its id


class TableFormat(Protocol):
    """How files of a kind are read. Both methods raise `Refused` for damage."""

    def inspect(self, path: Path) -> tuple[pa.Schema, int]:
        """The schema and the number of rows."""

    def read(self, path: Path, schema: pa.Schema, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        """Batches of at most `rows` rows with these columns of the table's schema."""


FORMATS: dict[str, TableFormat] = {
    ".parquet": Parquet(),
    ".pq": Parquet(),
    ".jsonl": JsonLines(),
    ".ndjson": JsonLines(),
    ".csv": Csv(),
    ".tsv": Csv("\t"),
}


@dataclass(frozen=True)
class Table:
    """Input files of one schema, as one table whose rows are numbered from 0 across the files."""

    paths: tuple[Path, ...]
    schema: pa.Schema
    num_rows: int
    formats: Mapping[str, TableFormat]  # by suffix
    skipped: int | None = None  # of a shard: rows of the files that come before its first

    @staticmethod
    def open(inputs: Sequence[Path], csv_delimiter: str | None = None) -> "Table":
        """Look at each file, and at all files of a folder. JSON Lines and CSV are read through once, to know their
        columns and to count them.

        CSV columns are text; `csv_delimiter` stands between the values of .csv files, None is a comma. Raises `Refused`
        with one line naming file, column, what was found and expected, and `UsageError` for a delimiter without CSV.
        """
        paths = [path for given in inputs for path in _files(given)]
        formats = FORMATS
        if csv_delimiter is not None:
            if not any(path.suffix.lower() == ".csv" for path in paths):
                raise UsageError(f"--csv-delimiter is {csv_delimiter!r}, but no input ends in .csv; leave it out")
            formats = FORMATS | {".csv": Csv(csv_delimiter)}
        schema, num_rows = pa.schema([]), 0
        for i, path in enumerate(paths):
            found, rows = _format_of(path, formats).inspect(path)
            _check_names(path, found)
            if i == 0:
                schema = found
            else:
                _check_same(path, found, paths[0], schema)
            num_rows += rows
            if num_rows > MAX_ROWS:
                raise Refused(f"{path} has row {num_rows:,}; a job has at most {MAX_ROWS:,}: split the input")
        if num_rows and not schema.names:
            raise Refused(f"{paths[0]} has {num_rows} rows and no column; expected a column with prompts")
        # Of several files only some may have nulls; what one of them promises counts for none.
        schema = pa.schema([field.with_nullable(True) for field in schema])
        return Table(tuple(paths), schema, num_rows, formats)

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
            for batch in _format_of(path, self.formats).read(path, self.schema, names, rows):
                if self.skipped is None:
                    yield first, batch
                elif first >= self.num_rows:
                    return
                elif first + batch.num_rows > 0:
                    start = max(0, -first)
                    yield first + start, cut(batch, start, min(batch.num_rows, self.num_rows - first))
                first += batch.num_rows


def _files(path: Path) -> list[Path]:
    """Of a folder those in it, in the order of their names; what begins with '.' or '_' is no table, by custom."""
    if not os.path.isdir(path):
        return [path]
    files = sorted(file for file in path.iterdir() if file.name[0] not in "._")
    if not files:
        raise Refused(f"{path} is a folder without a file; expected tables in it")
    return files


def find_field(schema: pa.Schema, name: str, path: Path) -> pa.Field:
    """The field of this name. Raises `Refused` naming file, column and the columns that are there."""
    if name not in schema.names:
        raise Refused(f"{path} has no column {name!r}; its columns are {', '.join(map(repr, schema.names))}")
    return schema.field(name)


def _format_of(path: Path, formats: Mapping[str, TableFormat]) -> TableFormat:
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
    if path.suffix.lower() not in formats:
        raise Refused(f"{path} has the suffix {path.suffix!r}; expected one of {', '.join(formats)}")
    return formats[path.suffix.lower()]


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
