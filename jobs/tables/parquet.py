"""Reading Parquet files as record batches, in bounded memory."""

from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import Refused
from batchinfer.jobs.tables import batches
from batchinfer.jobs.tables.batches import SLICE_ROWS, grouped, refusing
from batchinfer.jobs.tables.parquet_footer import Footer

FEW_ROWS = 16  # a row group with large cells and at most this many rows is read anew, from its start, for each row


class Parquet:
    """The format Parquet."""

    @staticmethod
    def inspect(path: Path) -> tuple[pa.Schema, int]:
        footer = Footer.read(path)
        with refusing(path, "Parquet"), _open_parquet(path) as file:
            return file.schema_arrow, footer.rows

    @staticmethod
    def read(path: Path, schema: pa.Schema, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        footer = Footer.read(path)
        slice_rows = min(rows, SLICE_ROWS, max(1, batches.BATCH_BYTES // footer.largest_row(columns)))
        with refusing(path, "Parquet"):
            # Row groups are read one by one: a batch from two groups could have two dictionaries in a nested column.
            slices = (
                table_slice.select(columns)
                for number, group in enumerate(footer.groups)
                for table_slice in (
                    _rows_alone(path, number, group.rows, columns)
                    if slice_rows == 1 and group.rows <= FEW_ROWS
                    else _slices(path, number, columns, slice_rows)
                )
            )
            count = 0
            for batch in grouped(slices, rows):
                count += batch.num_rows
                yield batch
            if count != footer.rows:
                raise Refused(
                    f"{path}: the footer counts {footer.rows} rows, its pages hold {count}; write the file anew"
                )


def _slices(path: Path, group: int, columns: list[str], rows: int) -> Generator[pa.RecordBatch]:
    with _open_parquet(path) as file:
        yield from file.iter_batches(rows, [group], columns, use_threads=False)


def _rows_alone(path: Path, group: int, rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows one by one. Each is read by a reader of its own that is closed first, since an open reader holds
    two more copies of a large cell."""
    for row in range(rows):
        with closing(_slices(path, group, columns, 1)) as slices:
            table_slice = next(islice(slices, row, None))
        yield table_slice
        del table_slice


def _open_parquet(path: Path) -> pq.ParquetFile:
    # Without pre-buffering and with small reads, memory does not depend on the size of row groups.
    return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
