"""Reading CSV files as record batches of text. TSV files are CSV files with a tab as delimiter."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv

from batchinfer.errors import Refused
from batchinfer.jobs.tables.batches import SLICE_ROWS, grouped, refusing

CSV_BLOCK_BYTES = 16 << 20
# Block size for a file with rows that do not fit into the usual block. Memory holds several such blocks.
MAX_ROW_BYTES = 112 << 20

UTF_8 = "utf-8"
HEADER_BYTES = 1 << 16  # of a file, which are searched for what its reader has to be told
# Byte order marks; the longer ones first, since they begin with shorter ones.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_DELIMITERS = {";": "';'", "\t": r"'\t'", "|": "'|'"}  # as they are written on a command line


@dataclass(frozen=True)
class Csv:
    """The format CSV. Values may be in quotes, also with line ends and delimiters in them.

    In UTF-8, bytes that are not UTF-8 are kept; in another encoding, a file with wrong bytes is refused.
    """

    delimiter: str = ","
    encoding: str = UTF_8  # as Python's codecs name it

    def inspect(self, path: Path) -> tuple[pa.Schema, int]:
        header = _header(path)
        if self.encoding == UTF_8 and (found := _wide_encoding(header)):
            raise Refused(f"{path} is not UTF-8 but {found}; give --csv-encoding {found}")
        with refusing(path, "CSV", self._remedy(header)):
            with self._open(path, (), CSV_BLOCK_BYTES if self._fits(path) else MAX_ROW_BYTES) as reader:
                names = reader.schema.names
            # Every column is text, since the first block alone does not tell a column's type.
            rows = sum(batch.num_rows for batch in self._blocks(path, names))
        return pa.schema([(name, pa.string()) for name in names]), rows

    def read(self, path: Path, schema: pa.Schema, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        with refusing(path, "CSV"):
            step = min(rows, SLICE_ROWS)
            blocks = self._blocks(path, schema.names)
            slices = (block.slice(i, step) for block in blocks for i in range(0, block.num_rows, step))
            yield from grouped((table_slice.select(columns) for table_slice in slices), rows)

    def _fits(self, path: Path) -> bool:
        """Return whether the first row fits into a usual block."""
        try:
            with self._open(path, (), CSV_BLOCK_BYTES):
                return True
        except pa.ArrowInvalid as error:
            if "straddling" not in str(error):
                raise
            return False

    def _blocks(self, path: Path, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield all columns as text, block by block. From the first row that does not fit into a usual block on, blocks
        are large."""
        done = 0
        try:
            for block in self._blocks_of(path, names, CSV_BLOCK_BYTES):
                done += block.num_rows
                yield block
            return
        except pa.ArrowInvalid as error:
            if "straddling" not in str(error):
                raise
        for block in self._blocks_of(path, names, MAX_ROW_BYTES):
            if done < block.num_rows:
                yield block.slice(done)
            done = max(0, done - block.num_rows)

    def _blocks_of(self, path: Path, names: Sequence[str], block_bytes: int) -> Iterator[pa.RecordBatch]:
        with self._open(path, names, block_bytes) as reader:  # gone before another begins: it holds several blocks
            yield from reader

    def _open(self, path: Path, text_columns: Sequence[str], block_bytes: int) -> pa_csv.CSVStreamingReader:
        return pa_csv.open_csv(
            path,
            pa_csv.ReadOptions(use_threads=False, block_size=block_bytes, encoding=self.encoding),
            pa_csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True),
            pa_csv.ConvertOptions(column_types=dict.fromkeys(text_columns, pa.string()), check_utf8=False),
        )

    def _remedy(self, header: bytes) -> str:
        """Return what to do about a file that cannot be read, as far as its header tells; or nothing."""
        try:
            names = header.decode(self.encoding)
        except UnicodeError:
            return "; name its encoding with --csv-encoding, as in --csv-encoding cp1252"
        return "" if self.delimiter in names else another_delimiter([names])


def another_delimiter(names: Sequence[str]) -> str:
    """Return which delimiter to give if these column names look like one name that was not split; or nothing."""
    signs = [shown for sign, shown in _DELIMITERS.items() if len(names) == 1 and sign in names[0]]
    return f"; if it is CSV separated by {signs[0]}, give --csv-delimiter {signs[0]}" if signs else ""


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.readline(HEADER_BYTES)


def _wide_encoding(header: bytes) -> str | None:
    """Return the encoding of a header whose characters have two or four bytes, with or without a mark."""
    for mark, name in _MARKS.items():
        if header.startswith(mark):
            return name
    if b"\0" not in header[:2]:
        return None
    return "utf-16-be" if header[0] == 0 else "utf-16-le"
