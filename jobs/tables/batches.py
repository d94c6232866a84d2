"""What readers of every format share: how large a batch gets, and damage that becomes a refusal."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from batchinfer.errors import Refused

BATCH_BYTES = 32 << 20  # a batch stops growing here, however few its rows
PIECE_ROWS = 128  # decoded at once, for a value may be large and repeated; batches are put together from such pieces


def grouped(pieces: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Pieces, none of more than `rows` rows, as batches of just `rows` rows, or fewer once they have `BATCH_BYTES`."""
    held: list[pa.RecordBatch] = []
    count = size = 0
    for piece in pieces:
        full = size + piece.nbytes > BATCH_BYTES  # a large cell comes alone: putting it together with others copies it
        if held and (full or count + piece.num_rows > rows):
            fits = 0 if full else rows - count
            if fits:
                held.append(piece.slice(0, fits))
            yield _taken(held)
            piece = piece.slice(fits)
            count = size = 0
        held.append(piece)
        count += piece.num_rows
        size += piece.nbytes
        del piece  # while the batch is at work nothing else holds what may be a large cell
    if held:
        yield _taken(held)


def _taken(held: list[pa.RecordBatch]) -> pa.RecordBatch:
    """What is held, as one batch; nothing holds it any more."""
    batch = held[0] if len(held) == 1 else pa.concat_batches(held)
    held.clear()
    return batch


@contextmanager
def refusing(path: Path, kind: str) -> Iterator[None]:
    """Damage becomes `Refused`; a true error of the system stays an `OSError`, with its number."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, PermissionError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        # A malformed row of CSV is quoted there; its number is enough.
        reason = re.sub(r"(, got \d+): .*", r"\1", reason)
        raise Refused(f"{path} cannot be read as {kind}: {reason}") from error
