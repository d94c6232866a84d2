"""Reading the lines of text files as a table, whatever is in them."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from batchinfer.jobs.tables.batches import BATCH_BYTES, refusing

MAX_LINE_BYTES = 32 << 20
NUMBER, LINE = "number", "line"
SCHEMA = pa.schema([pa.field(NUMBER, pa.int64()), pa.field(LINE, pa.large_binary())])


class Lines:
    """The format of lines: a row for each that is not blank, with its number in the file, from 1, and its bytes.

    The bytes are without the line's end; a line longer than `MAX_LINE_BYTES` has null.
    """

    def inspect(self, path: Path) -> tuple[pa.Schema, int]:
        with refusing(path, "lines of text"):
            return SCHEMA, sum(1 for _ in _lines(path))

    def read(self, path: Path, schema: pa.Schema, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        numbers: list[int] = []
        lines: list[bytes | None] = []
        size = 0
        with refusing(path, "lines of text"):
            for number, line in _lines(path):
                if numbers and (len(numbers) == rows or size + len(line or b"") > BATCH_BYTES):
                    yield _batch(numbers, lines, columns)
                    numbers, lines, size = [], [], 0
                numbers.append(number)
                lines.append(line)
                size += len(line or b"")
                del line  # it may be large; free it while the caller works on the batch
        if numbers:
            yield _batch(numbers, lines, columns)


def _batch(numbers: list[int], lines: list[bytes | None], columns: list[str]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(numbers, pa.int64()), pa.array(lines, pa.large_binary())], SCHEMA).select(columns)


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number, bytes) of each line that is not blank; None for the bytes of one that is too long."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield number, None
            elif line.strip():
                yield number, line.rstrip(b"\r\n")
