"""Reading input files of any format as one table, in record batches and bounded memory."""

import difflib
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.tables.csv import UTF_8, Csv, another_delimiter
from batchinfer.jobs.tables.folders import files_in, typed
from batchinfer.jobs.tables.input_file import InputFile, TableFormat
from batchinfer.jobs.tables.json_lines import JsonLines, cut, only
from batchinfer.jobs.tables.lines import Lines
from batchinfer.jobs.tables.parquet import Parquet
from batchinfer.jobs.tables.unify import promotions, unify

LINES: Mapping[str, TableFormat] = {".jsonl": Lines(), ".ndjson": Lines()}
CHECKED_ROWS = 8192  # read at once of columns that are only checked
MAX_ROWS = 1 << 31  # each row takes some bytes of memory: whether it is done, and the hash of its id


@dataclass(frozen=True)
class Table:
    """Input files as one table, or the rows of it that are chosen. Its rows are numbered from 0 across the files."""

    files: tuple[InputFile, ...]
    schema: pa.Schema
    num_rows: int
    notes: tuple[str, ...] = ()  # what of a file's columns is not as in the file
    chosen: pa.BooleanArray | None = None  # [rows of the files] which of them the table has, in bits; None: all
    skipped: int | None = None  # in a shard: number of rows of the table before its first

    @staticmethod
    def open(
        inputs: Sequence[Path],
        csv_delimiter: str | None = None,
        csv_encoding: str | None = None,
        verbatim: Collection[str] = (),
        lines: bool = False,
    ) -> "Table":
        """Open files, and all files in folders, as one table.

        Columns that differ between files are promoted, and `notes` says so; folders named key=value give columns. JSON
        Lines and CSV files are read once, to find their columns and count their rows. CSV columns are text.
        `csv_delimiter` separates the values of .csv files; None is a comma. `csv_encoding` is that of .csv and .tsv
        files; None is UTF-8. The columns in `verbatim` keep values of JSON Lines as each row wrote them (`JsonLines`).
        With `lines`, all files are JSON Lines, and their lines are the rows, unread (`Lines`).
        Raises `Refused`, naming file, column, what was found and what was expected, and `UsageError` for a delimiter or
        an encoding that no file has a use for.
        """
        found = [each for given in inputs for each in files_in(given)]
        formats = LINES if lines else _formats([path for path, _ in found], csv_delimiter, csv_encoding, verbatim)
        keys = typed([texts for _, texts in found])
        files: list[InputFile] = []
        num_rows = 0
        for (path, _), values in zip(found, keys, strict=True):
            files.append(_inspected(path, _format_of(path, formats), values))
            num_rows += files[-1].num_rows
            if num_rows > MAX_ROWS:
                raise Refused(f"{path} has row {num_rows:,}; a job has at most {MAX_ROWS:,}: split the input")
        schema = unify(files, verbatim)
        notes = tuple(promotions(files, schema))
        files = [_as_written(file, schema) for file in files]
        if num_rows and not schema.names:
            raise Refused(f"{files[0].path} has {num_rows} rows but no columns; expected a column with prompts")
        for file in files:
            _check_promoted(file, schema)
        return Table(tuple(files), schema, num_rows, notes)

    @property
    def paths(self) -> list[Path]:
        """The files' paths."""
        return [file.path for file in self.files]

    def shard(self, index: int, count: int) -> "Table":
        """Return shard `index`, from 0, of `count` shards: consecutive rows, as a table of its own.

        The sizes of two shards differ by at most one row.
        """
        first, end = (self.num_rows * i // count for i in (index, index + 1))
        return replace(self, num_rows=end - first, skipped=first)

    def only(self, chosen: pa.BooleanArray) -> "Table":
        """Return the table of the rows that are chosen [rows of the table]; the table has all rows of its files."""
        return replace(self, num_rows=chosen.true_count, chosen=chosen)

    def check(self, columns: Sequence[str]) -> None:
        """Raise `Refused`, naming file and column, if a column is missing."""
        for name in columns:
            find_field(self.schema, name, self.paths[0])

    def batches(self, columns: Sequence[str] | None, rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield (ordinal of the first row, batch) for all rows, with these columns or, for None, all columns.

        A batch has at most `rows` rows and about `BATCH_BYTES` bytes. It may have none, so that who reads it does not
        wait for the next row that is chosen. Raises `Refused` if a file is damaged.
        """
        names = self.schema.names if columns is None else list(columns)
        self.check(names)
        fields = [self.schema.field(name) for name in names]
        first = -(self.skipped or 0)
        for batch in self._chosen(fields, rows):
            if self.skipped is None:
                yield first, batch
            elif first >= self.num_rows:
                return
            elif first + batch.num_rows > 0:
                start = max(0, -first)
                yield first + start, cut(batch, start, min(batch.num_rows, self.num_rows - first))
            first += batch.num_rows

    def _chosen(self, fields: Sequence[pa.Field], rows: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows that are chosen. Files without any are not read, and no file is read beyond the last one."""
        first = 0
        for file in self.files:
            if self.chosen is None:
                yield from file.batches(fields, rows)
            else:
                yield from _only(file, fields, rows, self.chosen.slice(first, file.num_rows))
            first += file.num_rows


def _only(file: InputFile, fields: Sequence[pa.Field], rows: int, chosen: pa.BooleanArray) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a file that are chosen [rows of the file]."""
    left, first = chosen.true_count, 0
    for batch in file.batches(fields, rows) if left else ():
        kept = chosen.slice(first, len(batch))
        if len(kept) < len(batch):
            break
        left -= kept.true_count
        yield batch if kept.true_count == len(batch) else only(batch, kept.to_numpy(zero_copy_only=False))
        first += len(batch)
        if not left:
            return
    if left:
        raise Refused(f"{file.path} changed while it was read: it had {file.num_rows:,} rows; give the command again")


def find_field(schema: pa.Schema, name: str, path: Path) -> pa.Field:
    """Return the field of this name. Raises `Refused`, naming the file, the missing column and the columns it has."""
    if name not in schema.names:
        columns = ", ".join(map(repr, schema.names))
        near = nearest(name, schema.names)
        hint = another_delimiter(schema.names) or (f"; did you mean {near!r}?" if near else "")
        raise Refused(f"{path} has no column {name!r}; its columns are {columns}{hint}")
    return schema.field(name)


def nearest(name: str, columns: Sequence[str]) -> str | None:
    """Return the column that is spelled most like a name, whatever its capitals; None if none is much like it."""
    by_small_letters = {column.lower(): column for column in columns}
    near = difflib.get_close_matches(name.lower(), by_small_letters, n=1)
    return by_small_letters[near[0]] if near else None


def _formats(
    paths: list[Path], delimiter: str | None, encoding: str | None, verbatim: Collection[str]
) -> Mapping[str, TableFormat]:
    """Return the formats by suffix, with what the flags say of CSV, and the columns that JSON Lines keep verbatim."""
    suffixes = {path.suffix.lower() for path in paths}
    if delimiter is not None and ".csv" not in suffixes:
        raise UsageError(f"--csv-delimiter is {delimiter!r}, but no input ends in .csv; leave it out")
    if encoding is not None and not suffixes & {".csv", ".tsv"}:
        raise UsageError(f"--csv-encoding is {encoding!r}, but no input ends in .csv or .tsv; leave it out")
    lines, encoding = JsonLines(verbatim), encoding or UTF_8
    csv = {".csv": Csv(delimiter or ",", encoding), ".tsv": Csv("\t", encoding)}
    return {".parquet": Parquet(), ".pq": Parquet(), ".jsonl": lines, ".ndjson": lines, **csv}


def _as_written(file: InputFile, schema: pa.Schema) -> InputFile:
    """Return a file of JSON Lines with the columns that are text in the table as text, so that each keeps its line's
    own characters."""
    if not isinstance(file.format, JsonLines):
        return file
    kinds = {field.name: field.type for field in file.schema}
    texts = {name: pa.string() for name, kind in kinds.items() if schema.field(name).type == pa.string() != kind}
    return replace(file, schema=pa.schema((kinds | texts).items()))


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
        raise Refused(
            f"{path} has no bytes, so that its columns are unknown; leave it out, or give a CSV file a header"
        )
    if path.suffix.lower() not in formats:
        raise Refused(f"{path} has the suffix {path.suffix!r}; expected one of {', '.join(formats)}")
    return formats[path.suffix.lower()]


def _inspected(path: Path, format_: TableFormat, keys: Mapping[str, pa.Scalar]) -> InputFile:
    schema, num_rows = format_.inspect(path)
    _check_names(path, schema)
    file = InputFile(path, format_, schema, num_rows, keys)
    both = [name for name in keys if name in schema.names]
    for name in both:
        _check_equal(file, name)
    return replace(file, keys={name: value for name, value in keys.items() if name not in both})


def _check_equal(file: InputFile, name: str) -> None:
    """Raise `Refused` if a column has another value than the folder that gives the same column."""
    for batch in file.batches([file.schema.field(name)], CHECKED_ROWS):
        if not _has_only(batch.column(name), file.keys[name]):
            raise Refused(
                f"{file.path}: column {name!r} has other values than {file.keys[name]}, which its folder's name gives; "
                "rename the folder, or leave the column out of the file"
            )


def _has_only(column: pa.Array, key: pa.Scalar) -> bool:
    if not key.is_valid:
        return bool(column.null_count == len(column))
    try:
        return bool(column.cast(key.type).equals(pa.repeat(key, len(column))))
    except pa.ArrowException:  # a value that is no such number, or a type that is no value of a key
        return False


def _check_names(path: Path, schema: pa.Schema) -> None:
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise Refused(f"{path} has {schema.names.count(name)} columns named {name!r}; expected one")


def _check_promoted(file: InputFile, schema: pa.Schema) -> None:
    """Read the columns that get another type. Raises `Refused` if a value does not fit it."""
    promoted = [field for field in schema if file.type_of(field.name) not in (None, pa.null(), field.type)]
    for _ in file.batches(promoted, CHECKED_ROWS) if promoted else ():
        pass
