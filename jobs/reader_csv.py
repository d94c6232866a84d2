"""CSV files as record batches of text."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv

from batchinfer.jobs.batches import PIECE_ROWS, grouped, refusing

CSV_BLOCK_BYTES = 16 << 20  # a row must fit into one


class Csv:
    @staticmethod
    def inspect(path: Path) -> tuple[pa.Schema, int]:
        with refusing(path, "CSV"):
            with _open_csv(path) as reader:
                names = reader.schema.names
            # As text: the first block alone does not tell the type of a column.
            with _open_csv(path, names) as reader:
                rows = sum(batch.num_rows for batch in reader)
        return pa.schema([(name, pa.string()) for name in names]), rows

    @staticmethod
    def read(path: Path, schema: pa.Schema, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        with refusing(path, "CSV"), _open_csv(path, schema.names) as reader:
            step = min(rows, PIECE_ROWS)
            pieces = (batch.slice(i, step) for batch in reader for i in range(0, batch.num_rows, step))
            yield from grouped((piece.select(columns) for piece in pieces), rows)


def _open_csv(path: Path, text_columns: Sequence[str] = ()) -> pa_csv.CSVStreamingReader:
    return pa_csv.open_csv(
        path,
        pa_csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES),
        pa_csv.ParseOptions(newlines_in_values=True),
        pa_csv.ConvertOptions(column_types=dict.fromkeys(text_columns, pa.string()), check_utf8=False),
    )
