"""Checking the id column: each row must have an id, all ids must be of one kind, and no two may be equal.

A row's random seed comes from its id, and readers of the output find a row by its id. With wrong ids, both would be
wrong without an error.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from batchinfer.errors import Refused
from batchinfer.jobs.amounts import count_of
from batchinfer.jobs.tables.json_lines import indices_not_text
from batchinfer.jobs.tables.table import Table

BATCH_ROWS = 8192


def check_ids(table: Table, column: str) -> None:
    """Check the id column, of text or integers.

    Reads it once, with 8 bytes of memory for each row, and a second time if two hashes are equal. Raises `Refused`,
    naming file, column and rows, if an id is null, is not text in a text column, or is used twice.
    """
    hashes = np.empty(table.num_rows, np.uint64)
    end = 0
    for first, batch in table.batches([column], BATCH_ROWS):
        end = first + len(batch)
        if end > len(hashes):
            break
        _check_kinds(table, column, first, batch)
        hashes[first:end] = _hashes(id_bytes(batch.column(column)))
    if end != len(hashes):
        raise Refused(f"{_where(table, column)} changed while it was read; give the command again")
    hashes.sort()
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if len(repeated):
        _find_equal(table, column, repeated)


def id_bytes(ids: pa.Array) -> list[bytes]:
    """Return the text of each id as bytes; a number's text is its digits. No id may be null."""
    values: list[bytes] = as_text(ids).cast(pa.large_binary()).to_pylist()
    return values


def as_text(column: pa.Array) -> pa.Array:
    """Convert a column of text, JSON, UUIDs, numbers or times, also in a dictionary, to large_string."""
    if pa.types.is_dictionary(column.type):
        return as_text(column.dictionary).take(column.indices)
    if isinstance(column.type, pa.JsonType):  # pyarrow 26 casts JSON in string views to wrong text
        return as_text(column.storage)
    if isinstance(column.type, pa.UuidType):
        return pa.array([value and str(value) for value in column.to_pylist()], pa.large_string())
    return column.cast(pa.large_string())


def _check_kinds(table: Table, column: str, first: int, batch: pa.RecordBatch) -> None:
    ids = batch.column(column)
    if ids.null_count:
        row = first + pc.index(ids.is_null(), True).as_py()
        raise Refused(f"{_where(table, column)} is null in row {row}; every row needs an id")
    if no_text := indices_not_text(batch, column):
        raise Refused(
            f"{_where(table, column)} holds text and other values, as in row {first + no_text[0]}; ids must be all "
            "text, or all integers of 64 bits"
        )


def _hashes(ids: list[bytes]) -> NDArray[np.uint64]:
    digests = b"".join(hashlib.blake2b(value, digest_size=8).digest() for value in ids)
    return np.frombuffer(digests, np.uint64)


def _find_equal(table: Table, column: str, repeated: NDArray[np.uint64]) -> None:
    """Raise `Refused` for the first two rows with equal ids. Only ids with a hash in `repeated` (sorted) are
    compared."""
    seen: dict[bytes, int] = {}
    for row, value in _with_hash(table, column, repeated):
        if (before := seen.setdefault(value, row)) != row:
            raise Refused(
                f"{_where(table, column)} holds the same id in rows {before} and {row}; each id may be used once"
            )


def _with_hash(table: Table, column: str, wanted: NDArray[np.uint64]) -> Iterator[tuple[int, bytes]]:
    for first, batch in table.batches([column], BATCH_ROWS):
        ids = id_bytes(batch.column(column))
        for index in np.flatnonzero(np.isin(_hashes(ids), wanted)).tolist():
            yield first + index, ids[index]


def _where(table: Table, column: str) -> str:
    more = f" and {count_of(len(table.paths) - 1, 'more file')}" if len(table.paths) > 1 else ""
    return f"{table.paths[0]}{more}: column {column!r}"
