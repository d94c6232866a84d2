"""Calibration sequences: token ids of rows from a table, or of what every machine has, the standard library's text."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.tables.table import Table
from batchinfer.text.tokenizer import Tokenizer

TokenIds = NDArray[np.int32]

SPARE = 4
"""Times as many rows are drawn as are asked for: some are too short."""


def calibration_sequences(
    data: Path | None, column: str, rows: int, tokens: int, seed: int, tokenizer: Tokenizer
) -> list[TokenIds]:
    """`rows` sequences of at most `tokens` tokens, drawn from the table's rows: a piece of each, of long ones any.

    Where there are fewer rows, several pieces of a row, and at the end fewer sequences. Without `data` they are drawn
    from the source of the running Python's standard library. Raises `UsageError` and `Refused`.
    """
    if rows < 1:
        raise UsageError(f"--calibration-rows is {rows}; it must be 1 or more")
    if tokens < 2:
        raise UsageError(f"--calibration-tokens is {tokens}; it must be 2 or more")
    random = np.random.default_rng(seed)
    texts = _library(rows * SPARE, random) if data is None else _drawn(data, column, rows * SPARE, random)
    pieces: list[list[TokenIds]] = []
    for text in texts:
        ids, _ = tokenizer.encode_batch([text])
        first = random.integers(len(ids) % tokens + 1) if len(ids) > tokens else 0
        whole = [ids[a : a + tokens] for a in range(first, len(ids), tokens)]
        # Of a long row whole pieces alone, from anywhere in it.
        kept = [piece for piece in whole if len(piece) == min(tokens, max(len(ids), 2))]
        pieces.append([kept[i] for i in random.permutation(len(kept))])
        if sum(map(bool, pieces)) == rows:
            break
    found = [row[turn] for turn in range(max(map(len, pieces), default=0)) for row in pieces if turn < len(row)]
    if not found:
        raise Refused(f"{data}: column {column!r} has no text of two tokens or more to calibrate with")
    return found[:rows]


def _drawn(data: Path, column: str, rows: int, random: np.random.Generator) -> list[str]:
    """The text of random rows among those that have some, in random order: the rows with the smallest lots."""
    table = Table.open([data])
    table.check([column])
    drawn: list[tuple[float, str]] = []
    for _, batch in table.batches([column], 4096):
        texts = batch.column(column).to_pylist()
        lots = random.random(len(texts))
        lots[[not (isinstance(text, str) and text) for text in texts]] = np.inf
        nearest = np.argsort(lots)[:rows]
        drawn += [(lots[i], texts[i]) for i in nearest.tolist() if lots[i] < np.inf]
        drawn = sorted(drawn)[:rows]
    return [text for _, text in drawn]


def _library(rows: int, random: np.random.Generator) -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "encodings"}
    paths = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    for i in random.permutation(len(paths))[:rows]:
        yield paths[i].read_text("utf-8", errors="replace")
