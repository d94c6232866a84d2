"""Reading input files of any format as one table, in record batches and bounded memory."""

import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.tables.csv import Csv
from batchinfer.jobs.tables.json_lines import JsonLines, cut
from batchinfer.jobs.tables.parquet import Parquet

MAX_ROWS = 1 << 31  # each row takes some bytes of memory: whether it is done, and the hash of its id


class TableFormat(Protocol):
    """The interface of a format's reader. Both methods raise `Refused` if the file is damaged."""

    def inspect(self, path: Path) -> tuple[pa.Schema, int]:
        """Return the schema and the number of rows."""

    def read(self, path: Path, schema: pa.Schema, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        """Yield batches of at most `rows` rows with these columns of the table's schema."""


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
    """Input files of the same schema, as one table. Its rows are numbered from 0 across the files."""

    paths: tuple[Path, ...]
    schema: pa.Schema
    num_rows: int
    formats: Mapping[str, TableFormat]  # by suffix
    skipped: int | None = None  # in a shard: number of rows before its first

    @staticmethod
    def open(inputs: Sequence[Path], csv_delimiter: str | None = None, verbatim: Collection[str] = ()) -> "Table":
        """Open files, and all files in folders, as one table.

        JSON Lines and CSV files are read once, to find their columns and count their rows. CSV columns are text.
        `csv_delimiter` separates the values of .csv files; None is a comma. The columns in `verbatim` keep values of
        JSON Lines as each row wrote them (`JsonLines`). Raises `Refused`, naming file, column, what was found and what
        was expected, and `UsageError` for a delimiter without a .csv file.
        """
        paths = [path for given in inputs for path in _files(given)]
        formats = FORMATS | dict.fromkeys((".jsonl", ".ndjson"), JsonLines(verbatim))
        if csv_delimiter is not None:
            if not any(path.suffix.lower() == ".csv" for path in paths):
                raise UsageError(f"--csv-delimiter is {csv_delimiter!r}, but no input ends in .csv; leave it out")
            formats |= {".csv": Csv(csv_delimiter)}
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
            raise Refused(f"{paths[0]} has {num_rows} rows but no columns; expected a column with prompts")
        # All columns are nullable, since another file of the table may have nulls.
        schema = pa.schema([field.with_nullable(True) for field in schema])
        return Table(tuple(paths), schema, num_rows, formats)

    def shard(self, index: int, count: int) -> "Table":
        """Return shard `index`, from 0, of `count` shards: consecutive rows, as a table of its own.

        The sizes of two shards differ by at most one row.
        """
        first, end = (self.num_rows * i // count for i in (index, index + 1))
        return replace(self, num_rows=end - first, skipped=first)

    def check(self, columns: Sequence[str]) -> None:
        """Raise `Refused`, naming file and column, if a column is missing."""
        for name in columns:
            find_field(self.schema, name, self.paths[0])

    def batches(self, columns: Sequence[str] | None, rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield (ordinal of the first row, batch) for all rows, with these columns or, for None, all columns.

        A batch has at most `rows` rows and about `BATCH_BYTES` bytes. Raises `Refused` if a file is damaged.
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
    """Return the path of a file, or the files in a folder, sorted by name.

    Names that begin with '.' or '_' are left out, since by custom they are not tables.
    """
    if not os.path.isdir(path):
        return [path]
    files = sorted(file for file in path.iterdir() if file.name[0] not in "._")
    if not files:
        raise Refused(f"{path} is a folder without files; expected tables in it")
    return files


def find_field(schema: pa.Schema, name: str, path: Path) -> pa.Field:
    """Return the field of this name. Raises `Refused`, naming the file, the missing column and the columns it has."""
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
        raise Refused(f"{path} is {kind}; expected a regular file, which can be read more than once")
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
            raise Refused(f"{path} has a column {name!r}, which {first} lacks; all inputs need the same columns")
    for field in expected:
        other = find_field(found, field.name, path)
        if other.type != field.type:
            raise Refused(f"{path}: column {field.name!r} is {other.type}; expected {field.type}, as in {first}")
