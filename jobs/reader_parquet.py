"""Parquet files as record batches in bounded memory."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.jobs import batches
from batchinfer.jobs.batches import PIECE_ROWS, grouped, refusing
from batchinfer.jobs.parquet_footer import Footer
from batchinfer.jobs.spec import Refused


class Parquet:
    @staticmethod
    def inspect(path: Path) -> tuple[pa.Schema, int]:
        footer = Footer.read(path)
        with refusing(path, "Parquet"), _open_parquet(path) as file:
            return file.schema_arrow, footer.rows

    @staticmethod
    def read(path: Path, schema: pa.Schema, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        footer = Footer.read(path)
        piece_rows = min(rows, PIECE_ROWS, max(1, batches.BATCH_BYTES // footer.largest_row(columns)))
        with refusing(path, "Parquet"), _open_parquet(path) as file:
            # One row group after the other: a batch over two may have two dictionaries in a nested column.
            pieces = (
                piece.select(columns)
                for group in range(len(footer.groups))
                for piece in file.iter_batches(piece_rows, [group], columns, use_threads=False)
            )
            count = 0
            for batch in grouped(pieces, rows):
                count += batch.num_rows
                yield batch
            if count != footer.rows:
                raise Refused(f"{path}: the footer counts {footer.rows} rows, its pages hold {count}")


def _open_parquet(path: Path) -> pq.ParquetFile:
    # Without pre-buffering and with small reads, memory does not grow with a row group.
    return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
