"""Reading CSV files as record batches of text. TSV files are CSV files with a tab as delimiter."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv

from batchinfer.jobs.tables.batches import SLICE_ROWS, grouped, refusing

CSV_BLOCK_BYTES = 16 << 20
# Block size for a file with rows that do not fit into the usual block. Memory holds several such blocks.
MAX_ROW_BYTES = 112 << 20


@dataclass(frozen=True)
class Csv:
    """The format CSV. Values may be in quotes, also with line ends and delimiters in them."""

    delimiter: str = ","

    def inspect(self, path: Path) -> tuple[pa.Schema, int]:
        with refusing(path, "CSV"):
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
            with self._open(path, names, CSV_BLOCK_BYTES) as reader:
                for block in reader:
                    done += block.num_rows
                    yield block
                return
        except pa.ArrowInvalid as error:
            if "straddling" not in str(error):
                raise
        with self._open(path, names, MAX_ROW_BYTES) as reader:
            for block in reader:
                if done < block.num_rows:
                    yield block.slice(done)
                done = max(0, done - block.num_rows)

    def _open(self, path: Path, text_columns: Sequence[str], block_bytes: int) -> pa_csv.CSVStreamingReader:
        return pa_csv.open_csv(
            path,
            pa_csv.ReadOptions(use_threads=False, block_size=block_bytes),
            pa_csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True),
            pa_csv.ConvertOptions(column_types=dict.fromkeys(text_columns, pa.string()), check_utf8=False),
        )
