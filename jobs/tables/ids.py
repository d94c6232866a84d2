"""The column of ids: each row has one, of the same kind, and no two rows have the same.

A row's seed comes from its id, and whoever reads the output finds its row by it. Both would be wrong without a word.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from batchinfer.errors import Refused
from batchinfer.jobs.tables.json_lines import places_not_text
from batchinfer.jobs.tables.table import Table

BATCH_ROWS = 8192


def check_ids(table: Table, column: str) -> None:
    """Read the column of ids (text or integers) once, with 8 bytes a row in memory; twice where two hashes agree.

    Raises `Refused` naming file, column and rows where an id is null, no text among text, or there twice.
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
        raise Refused(f"{_where(table, column)} changed while it was read: give the command again")
    hashes.sort()
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if len(repeated):
        _find_equal(table, column, repeated)


def id_bytes(ids: pa.Array) -> list[bytes]:
    """What stands for each id, none of them null: its text, that of a number being its digits."""
    values: list[bytes] = as_text(ids).cast(pa.large_binary()).to_pylist()
    return values


def as_text(column: pa.Array) -> pa.Array:
    """Text, numbers and times as large_string, out of a dictionary too."""
    if pa.types.is_dictionary(column.type):
        return column.dictionary.cast(pa.large_string()).take(column.indices)
    return column.cast(pa.large_string())


def _check_kinds(table: Table, column: str, first: int, batch: pa.RecordBatch) -> None:
    ids = batch.column(column)
    if ids.null_count:
        row = first + pc.index(ids.is_null(), True).as_py()
        raise Refused(f"{_where(table, column)} is null in row {row}; every row needs an id")
    if no_text := places_not_text(batch, column):
        raise Refused(
            f"{_where(table, column)} holds something else than text in row {first + no_text[0]}; ids are all text, or "
            "all integers of 64 bits"
        )


def _hashes(ids: list[bytes]) -> NDArray[np.uint64]:
    digests = b"".join(hashlib.blake2b(value, digest_size=8).digest() for value in ids)
    return np.frombuffer(digests, np.uint64)


def _find_equal(table: Table, column: str, repeated: NDArray[np.uint64]) -> None:
    """Raises `Refused` for the first two rows whose ids are equal; their hashes are among `repeated` (sorted)."""
    seen: dict[bytes, int] = {}
    for row, value in _with_hash(table, column, repeated):
        if (before := seen.setdefault(value, row)) != row:
            raise Refused(f"{_where(table, column)} holds the same id in rows {before} and {row}; ids are there once")


def _with_hash(table: Table, column: str, wanted: NDArray[np.uint64]) -> Iterator[tuple[int, bytes]]:
    for first, batch in table.batches([column], BATCH_ROWS):
        ids = id_bytes(batch.column(column))
        for place in np.flatnonzero(np.isin(_hashes(ids), wanted)).tolist():
            yield first + place, ids[place]


def _where(table: Table, column: str) -> str:
    more = f" and {len(table.paths) - 1} more files" if len(table.paths) > 1 else ""
    return f"{table.paths[0]}{more}: column {column!r}"
