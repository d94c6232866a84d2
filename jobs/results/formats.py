"""The formats that an output may have, found by the suffix of its name."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeAlias

import pyarrow as pa

from batchinfer.errors import UsageError
from batchinfer.jobs.results.json_lines import JsonLines
from batchinfer.jobs.results.parquet import Parquet

FOLDER_SUFFIX = ".parquet"  # suffix of the files in an output folder

Rows: TypeAlias = pa.Table | memoryview  # a table, or bytes of a finished file of the same format


class Writer(Protocol):
    """Writes rows into an open file."""

    def write(self, rows: Rows) -> None:
        """Append rows: a table of the file's schema, or a slice from `OutputFormat.slices`."""


class OutputFormat(Protocol):
    """Writes rows into a file, and reads them from a finished file, in bounded memory."""

    def refuse_unfit(self, schema: pa.Schema) -> None:
        """Raise `Refused`, naming column and type, if a column cannot be written without loss of meaning.

        `schema` has the input's columns only; every format must also write those of `schema.py`, with nested `samples`.
        """

    def open(self, file: pa.NativeFile, schema: pa.Schema) -> AbstractContextManager[Writer]:
        """Begin to write a file. It has all rows when the context ends, and may be closed then."""

    def schema(self, path: Path) -> pa.Schema:
        """Return the schema of a finished file, or an empty one if the format does not store it.

        `merge` gives it to `open`, so a format with a header must return the names in it.
        """

    def slices(self, path: Path) -> Iterator[Rows]:
        """Yield all rows of a finished file, slice by slice, for the `Writer` of another file.

        They come without what `open` writes by itself, such as a header.
        """

    def results(self, path: Path) -> Iterator[pa.Table]:
        """Yield the columns of a finished file that `verify` counts. Raises `Refused` if the file is damaged."""


FORMATS: dict[str, OutputFormat] = {
    ".parquet": Parquet(),
    ".jsonl": JsonLines(),
}


def format_of(output: Path) -> OutputFormat:
    """Return the format of an output file, or of the files in an output folder, by the suffix of the output's name.

    Raises `UsageError` for a suffix that is not in `FORMATS`.
    """
    suffix = FOLDER_SUFFIX if is_folder(output) else output.suffix
    if suffix not in FORMATS or not output.name:
        raise UsageError(
            f"--output is {output}; its name must end in {suffixes()}, or have no suffix to make a folder of "
            f"{FOLDER_SUFFIX} files"
        )
    return FORMATS[suffix]


def is_folder(output: Path) -> bool:
    """Return whether an output's name stands for a folder of files: it has no suffix."""
    return not output.suffix


def suffixes() -> str:
    """Return the suffixes that an output may have, for messages."""
    *first, last = FORMATS
    return f"{', '.join(first)} or {last}"
