"""The formats that an output may have, found by the suffix of its name."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeAlias

import pyarrow as pa

from batchinfer.errors import UsageError
from batchinfer.jobs.results.json_lines import JsonLines
from batchinfer.jobs.results.parquet import Parquet

FOLDER_SUFFIX = ".parquet"  # of the files in an output that is a folder

Rows: TypeAlias = pa.Table | memoryview  # a table, or bytes as they stand in a finished file of the same format


class Writer(Protocol):
    """Rows on their way into a file."""

    def write(self, rows: Rows) -> None:
        """Add rows behind the others: a table of the file's schema, or what `OutputFormat.pieces` gave."""


class OutputFormat(Protocol):
    """How rows are written into a file, and read again from a finished one, in bounded memory."""

    def refuse_unfit(self, schema: pa.Schema) -> None:
        """Raises `Refused`, naming column and type, where a column cannot be written without loss of meaning."""

    def open(self, file: pa.NativeFile, schema: pa.Schema) -> AbstractContextManager[Writer]:
        """Begin a file. All rows are in it when the context ends, which may close it."""

    def schema(self, path: Path) -> pa.Schema:
        """The schema of a finished file; without a column where the format does not say it."""

    def pieces(self, path: Path) -> Iterator[Rows]:
        """All rows of a finished file, as the `Writer` of another one takes them."""

    def results(self, path: Path) -> Iterator[pa.Table]:
        """The columns of results of a finished file, as far as they are counted. Raises `Refused` for damage."""


FORMATS: dict[str, OutputFormat] = {
    ".parquet": Parquet(),
    ".jsonl": JsonLines(),
}


def format_of(output: Path) -> OutputFormat:
    """The format of a file, or of the files in a folder. Raises `UsageError` for a suffix that is not in `FORMATS`."""
    suffix = FOLDER_SUFFIX if is_folder(output) else output.suffix
    if suffix not in FORMATS or not output.name:
        raise UsageError(
            f"--output is {output}; its name must end in {suffixes()}, or have no suffix: then it is a folder of "
            f"{FOLDER_SUFFIX} files"
        )
    return FORMATS[suffix]


def is_folder(output: Path) -> bool:
    """Whether an output is a folder of files, by its name."""
    return not output.suffix


def suffixes() -> str:
    """Those that an output may have, for messages."""
    return " or ".join(FORMATS)
