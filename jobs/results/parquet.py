"""Outputs in Parquet: compressed row groups of bounded size, with a checksum for each page."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import Refused
from batchinfer.jobs.results.schema import PARQUET, counted

GROUP_BYTES = 1 << 25  # after which the next row group begins, before compression
SLICE_ROWS = 8192


class Parquet:
    """The format Parquet. It keeps the types of all columns of the input."""

    @staticmethod
    def refuse_unfit(schema: pa.Schema) -> None:
        """Refuse nothing: Parquet holds every column."""

    @staticmethod
    @contextmanager
    def open(file: pa.NativeFile, schema: pa.Schema) -> Iterator["_RowGroups"]:
        # No statistics for text: a text column's minimum and maximum would be copies of whole cells, however large.
        primitive = [field.name for field in schema if pa.types.is_primitive(field.type)]
        coded = [*primitive, *(path for field in schema for path in _dictionaries(field.name, field.type))]
        with pq.ParquetWriter(file, schema, write_statistics=primitive, use_dictionary=coded, **PARQUET) as writer:
            groups = _RowGroups(writer)
            yield groups
            groups.flush()

    @staticmethod
    def schema(path: Path) -> pa.Schema:
        return pq.read_schema(path)

    @staticmethod
    def slices(path: Path) -> Iterator[pa.Table]:
        with _open(path) as file:
            # Read about a row group at a time, whose bytes are bounded: with many samples a few rows are large already.
            group_rows = 1 + file.metadata.num_rows // max(1, file.metadata.num_row_groups)
            # A batch from two groups could have two dictionaries.
            for group in range(file.metadata.num_row_groups):
                for batch in file.iter_batches(min(SLICE_ROWS, group_rows), [group], use_threads=False):
                    yield pa.Table.from_batches([batch], file.schema_arrow)

    @staticmethod
    def results(path: Path) -> Iterator[pa.Table]:
        try:
            with _open(path) as file:
                for batch in file.iter_batches(columns=counted(file.schema_arrow), use_threads=False):
                    yield pa.Table.from_batches([batch])
        except (pa.ArrowException, OSError) as error:
            raise Refused(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def _dictionaries(path: str, kind: pa.DataType) -> Iterator[str]:
    """Yield the paths of all columns of a type whose values lie in dictionaries, as Parquet names them.

    Written in any other way, a dictionary loses its order, and the values that no row has.
    """
    if pa.types.is_dictionary(kind):
        yield path
    elif pa.types.is_struct(kind):
        for field in kind:
            yield from _dictionaries(f"{path}.{field.name}", field.type)
    elif pa.types.is_map(kind):
        yield from _dictionaries(f"{path}.key_value.key", kind.key_type)
        yield from _dictionaries(f"{path}.key_value.value", kind.item_type)
    elif pa.types.is_nested(kind):
        yield from _dictionaries(f"{path}.list.element", kind.value_type)


class _RowGroups:
    """Gathers tables until they fill a row group. Ordered categories are the same in the whole row group."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._waiting: list[pa.Table] = []
        self._ordered = [
            i for i, kind in enumerate(writer.schema.types) if pa.types.is_dictionary(kind) and kind.ordered
        ]

    def write(self, rows: pa.Table) -> None:
        if any(_contradict(rows.column(i), waiting.column(i)) for waiting in self._waiting for i in self._ordered):
            self.flush()
        self._waiting.append(rows)
        if sum(waiting.nbytes for waiting in self._waiting) >= GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the gathered tables as a row group."""
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting).unify_dictionaries())
            self._waiting = []


def _contradict(a: pa.ChunkedArray, b: pa.ChunkedArray) -> bool:
    """Return whether the categories of neither column begin with all those of the other."""
    first, second = a.chunk(0).dictionary, b.chunk(0).dictionary
    both = min(len(first), len(second))
    return not first.slice(0, both).equals(second.slice(0, both))


def _open(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
