"""One file of a table, and its batches with the columns and types that the table has."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from batchinfer.errors import Refused


class TableFormat(Protocol):
    """The interface of a format's reader. Both methods raise `Refused` if the file is damaged."""

    def inspect(self, path: Path) -> tuple[pa.Schema, int]:
        """Return the schema and the number of rows."""

    def read(self, path: Path, schema: pa.Schema, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        """Yield batches of at most `rows` rows with these columns of the schema that `inspect` has found."""


@dataclass(frozen=True)
class InputFile:
    """A file of a table. `keys` are columns with the same value in all of its rows, which its folders' names give."""

    path: Path
    format: TableFormat
    schema: pa.Schema
    num_rows: int
    keys: Mapping[str, pa.Scalar] = field(default_factory=dict)

    def type_of(self, column: str) -> pa.DataType | None:
        """Return the type that a column has here; None if it is absent."""
        if column in self.keys:
            return self.keys[column].type
        index = self.schema.get_field_index(column)
        return self.schema.field(index).type if index >= 0 else None

    def batches(self, fields: Sequence[pa.Field], rows: int) -> Iterator[pa.RecordBatch]:
        """Yield batches of at most `rows` rows with these fields. A column that is absent here has nulls.

        Raises `Refused` if the file is damaged, or has a value that a field's type cannot hold.
        """
        own = [wanted.name for wanted in fields if self.schema.get_field_index(wanted.name) >= 0]
        if not own:
            sizes = (min(rows, self.num_rows - first) for first in range(0, self.num_rows, rows))
            yield from (self._conforming(pa.record_batch([], names=[]), fields, size) for size in sizes)
            return
        for batch in self.format.read(self.path, self.schema, own, rows):
            yield self._conforming(batch, fields, batch.num_rows)
            del batch  # frees a large cell while the next batch is read

    def _conforming(self, batch: pa.RecordBatch, fields: Sequence[pa.Field], rows: int) -> pa.RecordBatch:
        if batch.schema.types == [wanted.type for wanted in fields]:
            return batch  # all columns are the file's own
        columns = [self._column(batch, wanted, rows) for wanted in fields]
        return pa.record_batch(columns, pa.schema(list(fields), batch.schema.metadata))

    def _column(self, batch: pa.RecordBatch, wanted: pa.Field, rows: int) -> pa.Array:
        found = self.type_of(wanted.name)
        if found is None or pa.types.is_null(found):
            return pa.nulls(rows, wanted.type)
        try:
            if wanted.name in self.keys:
                return pa.repeat(self.keys[wanted.name].cast(wanted.type), rows)
            column = batch.column(wanted.name)
            return column if found == wanted.type else _cast(column, wanted.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise Refused(
                f"{self.path}: column {wanted.name!r} is {found}, and a value of it does not fit {wanted.type}, which "
                "other files make of it; give it one type in all files"
            ) from error


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """Raises `pa.ArrowInvalid` if a value would not come back. pyarrow does not look at decimals that become floats."""
    converted = column.cast(kind)
    if pa.types.is_decimal(column.type) and not converted.cast(column.type).equals(column):
        raise pa.ArrowInvalid("a decimal has more digits than a float")
    return converted
