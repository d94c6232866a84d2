"""Reading which rows of a table have equal values in a template's fields, and how long these are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from batchinfer.jobs.tables.ids import as_text
from batchinfer.jobs.tables.table import Table

Numbers = NDArray[np.int32]

BATCH_ROWS = 1 << 15
MOST_ROWS = 1 << 21  # of which values are kept: 8 bytes for each field; and three such numbers fit into 63 bits


@dataclass(frozen=True, eq=False)
class FieldValues:
    """The values of some fields in at most `MOST_ROWS` rows."""

    # Of each field, [rows]: equal numbers for equal values, from 0 to less than the number of rows
    codes: list[Numbers]
    lengths: list[Numbers]  # of each field, [rows]: bytes of the value's text
    step: int = 1  # of how many rows one was looked at

    @property
    def rows(self) -> int:
        return len(self.codes[0])

    def take(self, rows: NDArray[np.integer]) -> "FieldValues":
        """Return the values of the rows at these indices."""
        return FieldValues([codes[rows] for codes in self.codes], [sizes[rows] for sizes in self.lengths], self.step)


def read_field_values(table: Table, names: Sequence[str]) -> FieldValues:
    """Read columns of scalars, in bounded memory. Rows with a null are left out, since they have no prompt.

    Of a table with more than `MOST_ROWS` rows every k-th row is taken: then fewer values are found to be repeated than
    are. Raises `Refused` if a column is missing or a file is damaged.
    """
    step = max(1, -(-table.num_rows // MOST_ROWS))
    hashes: list[list[NDArray[np.int64]]] = [[np.zeros(0, np.int64)] for _ in names]
    lengths: list[list[Numbers]] = [[np.zeros(0, np.int32)] for _ in names]
    for first, batch in table.batches(names, BATCH_ROWS):
        if step > 1:
            batch = batch.take(pa.array(np.arange(-first % step, len(batch), step)))
        columns = [as_text(column) for column in batch.columns]
        nulls = np.zeros(len(batch), np.bool_)
        for column in columns:
            nulls |= column.is_null().to_numpy(zero_copy_only=False)
        for index, column in enumerate(columns):
            column_hashes, sizes = _hashed(column.filter(pa.array(~nulls)))
            hashes[index].append(column_hashes)
            lengths[index].append(sizes)
    codes = [np.unique(np.concatenate(some), return_inverse=True)[1].astype(np.int32) for some in hashes]
    return FieldValues(codes, [np.concatenate(some) for some in lengths], step)


def _hashed(column: pa.Array) -> tuple[NDArray[np.int64], Numbers]:
    """Return (a hash of each value [n], its length in bytes [n]). A value that the column repeats is hashed once."""
    encoded = column.dictionary_encode()
    values = encoded.dictionary.cast(pa.large_binary())
    hashes = np.fromiter(map(hash, values.to_pylist()), np.int64, len(values))
    lengths = pc.binary_length(values).to_numpy().astype(np.int32)
    index = encoded.indices.to_numpy()
    return hashes[index], lengths[index]
