"""Code that the readers of all formats share: limiting the size of batches, and refusing damaged files."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from batchinfer.errors import Refused

BATCH_BYTES = 32 << 20  # a batch with this many bytes is full, even with few rows
SLICE_ROWS = 128  # rows decoded at once: few, since values may be large and repeated; batches are joined from slices


def grouped(slices: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Join slices of at most `rows` rows each into batches of `rows` rows, or fewer if they reach `BATCH_BYTES`."""
    held: list[pa.RecordBatch] = []
    count = size = 0
    for table_slice in slices:
        slice_bytes = table_slice.nbytes  # computed once, since it takes longer than joining the slice
        full = size + slice_bytes > BATCH_BYTES  # a large cell stays alone, since joining it copies it
        if held and (full or count + table_slice.num_rows > rows):
            fits = 0 if full else rows - count
            if fits:
                held.append(table_slice.slice(0, fits))
            yield _taken(held)
            table_slice = table_slice.slice(fits)
            slice_bytes = table_slice.nbytes
            count = size = 0
        held.append(table_slice)
        count += table_slice.num_rows
        size += slice_bytes
        del table_slice  # frees a large cell while the caller works on the batch
    if held:
        yield _taken(held)


def _taken(held: list[pa.RecordBatch]) -> pa.RecordBatch:
    """Join the slices in `held` into one batch, and empty `held`."""
    batch = held[0] if len(held) == 1 else pa.concat_batches(held)
    held.clear()
    return batch


@contextmanager
def refusing(path: Path, kind: str, remedy: str = "") -> Iterator[None]:
    """Turn errors from damaged files into `Refused`, ending in `remedy`. Errors of the system stay `OSError`, with
    their number."""
    try:
        yield
    except (pa.ArrowException, UnicodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, PermissionError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        # pyarrow quotes a malformed CSV row. The message keeps its number only.
        reason = re.sub(r"(, got \d+): .*", r"\1", reason)
        raise Refused(f"{path} cannot be read as {kind}: {reason}{remedy}") from error
