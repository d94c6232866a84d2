"""Parquet files as record batches in bounded memory."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.jobs import batches
from batchinfer.jobs.batches import PIECE_ROWS, grouped, refusing
from batchinfer.jobs.spec import Refused


class Parquet:
    @staticmethod
    def inspect(path: Path) -> tuple[pa.Schema, int]:
        with refusing(path, "Parquet"), _open_parquet(path) as file:
            metadata = file.metadata
            counted = sum(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
            if counted != metadata.num_rows:
                raise Refused(f"{path}: the footer counts {metadata.num_rows} rows, its row groups {counted}")
            return file.schema_arrow, counted

    @staticmethod
    def read(path: Path, schema: pa.Schema, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        with refusing(path, "Parquet"), _open_parquet(path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            widest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
            piece_rows = min(rows, PIECE_ROWS, max(1, batches.BATCH_BYTES // 4 // max(widest, 1)))
            pieces = file.iter_batches(piece_rows, columns=columns, use_threads=False)
            count = 0
            for batch in grouped((piece.select(columns) for piece in pieces), rows):
                count += batch.num_rows
                yield batch
            if count != file.metadata.num_rows:
                raise Refused(f"{path}: the footer counts {file.metadata.num_rows} rows, its pages hold {count}")


def _open_parquet(path: Path) -> pq.ParquetFile:
    # Without pre-buffering and with small reads, memory does not grow with a row group.
    return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
