"""Reading Parquet files as record batches, in bounded memory."""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from itertools import islice, product
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
        with (
            refusing(path, "Parquet"),
            _naming_wide_integers(path, footer),
            _open_parquet(path, _int96_unit(path, footer)) as file,
        ):
            return file.schema_arrow, footer.rows

    @staticmethod
    def read(path: Path, schema: pa.Schema, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        footer = Footer.read(path)
        in_ns = any("timestamp[ns" in str(schema.field(name).type) for name in footer.int96)
        unit = "ns" if in_ns else "us"
        with refusing(path, "Parquet"):
            # Row groups are read one by one: a batch from two groups could have two dictionaries in a nested column.
            slices = (
                table_slice.select(columns)
                for number in range(len(footer.groups))
                for table_slice in _bounded_slices(footer, number, columns, rows, unit)
            )
            count = 0
            for batch in grouped(slices, rows):
                count += batch.num_rows
                yield batch
            if count != footer.rows:
                raise Refused(
                    f"{path}: the footer counts {footer.rows} rows, its pages hold {count}; write the file anew"
                )


def _bounded_slices(footer: Footer, number: int, columns: list[str], rows: int, unit: str) -> Iterator[pa.RecordBatch]:
    """Return slices of a row group, each of so few of its largest rows that they fit in a batch."""
    largest = footer.largest_row(number, columns, batches.BATCH_BYTES // SLICE_ROWS)
    slice_rows = min(rows, SLICE_ROWS, max(1, batches.BATCH_BYTES // largest))
    group_rows = footer.groups[number].rows
    if slice_rows == 1 and group_rows <= FEW_ROWS:
        return _rows_alone(footer.path, number, group_rows, columns, unit)
    return _slices(footer.path, number, columns, slice_rows, unit)


def _slices(path: Path, group: int, columns: list[str], rows: int, unit: str) -> Generator[pa.RecordBatch]:
    with _open_parquet(path, unit) as file:
        yield from file.iter_batches(rows, [group], columns, use_threads=False)


def _rows_alone(path: Path, group: int, rows: int, columns: list[str], unit: str) -> Iterator[pa.RecordBatch]:
    """Yield the rows one by one. Each is read by a reader of its own that is closed first, since an open reader holds
    two more copies of a large cell."""
    for row in range(rows):
        with closing(_slices(path, group, columns, 1, unit)) as slices:
            table_slice = next(islice(slices, row, None))
        yield table_slice
        del table_slice


def _int96_unit(path: Path, footer: Footer) -> str:
    """Return the unit in which all INT96 timestamps of a file can be read: "us", or "ns" where microseconds do not do.

    Nanoseconds reach from 1677 to 2262 only, and INT96 does not say its unit: Spark writes microseconds of any year,
    others nanoseconds. Raises `Refused` if a file has both values of other years and nanoseconds.
    """
    finer: dict[str, None] = {}  # columns with nanoseconds
    beyond: dict[str, None] = {}  # columns with other years
    for column, group in product(footer.int96, range(len(footer.groups))):
        readings = (_slices(path, group, [column], SLICE_ROWS, unit) for unit in ("us", "ns"))
        for in_us, in_ns in zip(*readings, strict=True):
            # Values beyond the range wrap around, in this product as in pyarrow's reader.
            if not in_us.cast(in_ns.schema, safe=False).equals(in_ns):
                finer[column] = None
            if not _fits(in_us, in_ns.schema):
                beyond[column] = None
    if finer and beyond:
        raise Refused(
            f"{path}: column {next(iter(beyond))!r} has INT96 timestamps before 1677 or after 2262, and column "
            f"{next(iter(finer))!r} has some with nanoseconds, which cannot be read together; round them to "
            "microseconds"
        )
    return "ns" if finer else "us"


def _fits(batch: pa.RecordBatch, schema: pa.Schema) -> bool:
    try:
        batch.cast(schema)
    except pa.ArrowInvalid:
        return False
    return True


@contextmanager
def _naming_wide_integers(path: Path, footer: Footer) -> Iterator[None]:
    """Raise `Refused`, naming the columns, where pyarrow cannot open a file because of integers of 128 bits."""
    try:
        yield
    except pa.ArrowNotImplementedError as error:
        if "more than 64 bits" not in str(error):
            raise
        columns = " or ".join(map(repr, footer.bare16))
        raise Refused(
            f"{path}: column {columns} has integers of 128 bits, and pyarrow opens no file that has such a column; "
            "write the file without it, or cast it to decimals or to integers of 64 bits"
        ) from error


def _open_parquet(path: Path, int96_unit: str = "us") -> pq.ParquetFile:
    # Without pre-buffering and with small reads, memory does not depend on the size of row groups.
    return pq.ParquetFile(
        path,
        pre_buffer=False,
        buffer_size=1 << 20,
        page_checksum_verification=True,
        coerce_int96_timestamp_unit=int96_unit,
    )
