"""Reading all parts together, by ascending ordinal and in bounded memory, to merge the output."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.jobs.results.done import REMEDY
from batchinfer.jobs.results.schema import ROW


class PartsInOrder:
    """Merges parts. A part is opened when its first ordinal is reached. If a row is in several parts, the last
    counts."""

    def __init__(self, parts: list[tuple[Path, int]], schema: pa.Schema) -> None:
        """`parts` has (path, first ordinal) of each part, by part number; `schema` has the columns that are read."""
        self._schema = schema
        numbered = [(number, path, first) for number, (path, first) in enumerate(parts)]
        self._later = sorted(numbered, key=lambda part: part[2], reverse=True)
        self._open: list[tuple[int, _Cursor]] = []

    def take(self, first: int, end: int) -> pa.Table | None:
        """Return rows `first` to `end - 1`, in order. Returns None if one of them is missing or there are other
        rows."""
        while self._later and self._later[-1][2] < end:
            number, path, _ = self._later.pop()
            self._open.append((number, _Cursor(path, self._schema)))
        self._open.sort(key=lambda opened: opened[0])
        tables = (table for _, cursor in self._open for table in cursor.below(end))
        table = pa.concat_tables([self._schema.empty_table(), *tables])
        self._open = [opened for opened in self._open if not opened[1].exhausted]
        rows = table[ROW].to_numpy()
        order = np.argsort(rows, kind="stable")
        last = np.append(np.diff(rows[order]) != 0, True)[: len(rows)]
        order = order[last]
        if not np.array_equal(rows[order], np.arange(first, end)):
            return None
        return table.take(order).combine_chunks()


class _Cursor:
    """Reads one part, a row group at a time. The file is closed in between, since a job may have thousands of parts."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._metadata = pq.read_metadata(path)
        self._next_group = 0
        self._table = schema.empty_table()

    @property
    def exhausted(self) -> bool:
        return not len(self._table) and self._next_group == self._metadata.num_row_groups

    def below(self, end: int) -> Iterator[pa.Table]:
        """Yield the rows with ordinals below `end` that were not yielded yet."""
        while not self.exhausted:
            if not len(self._table):
                self._table = self._read(self._next_group)
                self._next_group += 1
            count = int(np.searchsorted(self._table[ROW].to_numpy(), end))
            yield self._table.slice(0, count)
            self._table = self._table.slice(count)
            if len(self._table):
                return

    def _read(self, group: int) -> pa.Table:
        try:
            with pq.ParquetFile(
                self._path, metadata=self._metadata, page_checksum_verification=True, pre_buffer=False
            ) as file:
                columns = self._table.schema.names
                return file.read_row_group(group, columns, use_threads=False).replace_schema_metadata(None)
        except (OSError, pa.ArrowException) as error:
            raise OSError(f"part {self._path} is damaged: {error}; {REMEDY}") from error
