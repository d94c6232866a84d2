"""Finding the requests whose custom_id an earlier one has: an answer could not be told from the other's."""

import hashlib

import numpy as np

from batchinfer.errors import Refused
from batchinfer.jobs.openai_batch.request import custom_id_of
from batchinfer.jobs.tables.lines import LINE, NUMBER
from batchinfer.jobs.tables.table import Table

BATCH_ROWS = 8192
DIGEST_BYTES = 16


def repeated(table: Table) -> dict[int, int]:
    """Return the ordinals of such rows, each with the number of the line that has its custom_id first.

    Reads the table once, with 24 bytes of memory for each row. Raises `Refused` if its files change meanwhile.
    """
    digests = np.zeros(table.num_rows, f"V{DIGEST_BYTES}")
    numbers = np.zeros(table.num_rows, np.int64)
    end = 0
    for first, batch in table.batches([NUMBER, LINE], BATCH_ROWS):
        end = first + len(batch)
        if end > len(digests):
            break
        found = [custom_id_of(line.as_py()) for line in batch.column(LINE)]
        joined = b"".join(_digest(name, first + i) for i, name in enumerate(found))
        digests[first:end] = np.frombuffer(joined, digests.dtype)
        numbers[first:end] = batch.column(NUMBER).to_numpy()
    if end != len(digests):
        raise Refused(f"{table.paths[0]} changed while it was read; give the command again")
    _, first_of, inverse = np.unique(digests, return_index=True, return_inverse=True)
    earlier = first_of[inverse.reshape(-1)]
    return {row: int(numbers[earlier[row]]) for row in np.flatnonzero(earlier != np.arange(len(digests))).tolist()}


def _digest(name: str | None, row: int) -> bytes:
    """Return a digest of a custom_id; a row without one has a digest of its own."""
    kind, text = (b"row", str(row)) if name is None else (b"id", name)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES, person=kind).digest()
