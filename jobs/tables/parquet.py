"""Parquet files as record batches in bounded memory."""

from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import Refused
from batchinfer.jobs.tables import batches
from batchinfer.jobs.tables.batches import PIECE_ROWS, grouped, refusing
from batchinfer.jobs.tables.parquet_footer import Footer

FEW_ROWS = 16  # of a row group with large cells: each is read anew, from the group's start


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
        with refusing(path, "Parquet"):
            # One row group after the other: a batch over two may have two dictionaries in a nested column.
            pieces = (
                piece.select(columns)
                for number, group in enumerate(footer.groups)
                for piece in (
                    _rows_alone(path, number, group.rows, columns)
                    if piece_rows == 1 and group.rows <= FEW_ROWS
                    else _pieces(path, number, columns, piece_rows)
                )
            )
            count = 0
            for batch in grouped(pieces, rows):
                count += batch.num_rows
                yield batch
            if count != footer.rows:
                raise Refused(f"{path}: the footer counts {footer.rows} rows, its pages hold {count}")


def _pieces(path: Path, group: int, columns: list[str], rows: int) -> Generator[pa.RecordBatch]:
    with _open_parquet(path) as file:
        yield from file.iter_batches(rows, [group], columns, use_threads=False)


def _rows_alone(path: Path, group: int, rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Each by a reader that is closed before the row is used: an open one holds a large cell twice, beside the row."""
    for row in range(rows):
        with closing(_pieces(path, group, columns, 1)) as pieces:
            piece = next(islice(pieces, row, None))
        yield piece
        del piece


def _open_parquet(path: Path) -> pq.ParquetFile:
    # Without pre-buffering and with small reads, memory does not grow with a row group.
    return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
