"""Choosing calibration sequences: token ids from rows of a table, or from the source of Python's standard library."""

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
"""Factor by which more rows are drawn than sequences are wanted, since some rows are too short."""


def calibration_sequences(
    data: Path | None, column: str, rows: int, tokens: int, seed: int, tokenizer: Tokenizer
) -> list[TokenIds]:
    """Draw `rows` sequences of at most `tokens` tokens from a table: one chunk from each row, at random in long rows.

    If the table has too few rows, several chunks of a row are taken. If that is not enough, fewer sequences are
    returned. Without `data`, the text is the source of the running Python's standard library. Raises `UsageError` for
    numbers that are too small, and `Refused` if there is no text.
    """
    if rows < 1:
        raise UsageError(f"--calibration-rows is {rows}; it must be 1 or more")
    if tokens < 2:
        raise UsageError(f"--calibration-tokens is {tokens}; it must be 2 or more")
    random = np.random.default_rng(seed)
    texts = _library(rows * SPARE, random) if data is None else _drawn(data, column, rows * SPARE, random)
    chunks: list[list[TokenIds]] = []
    for text in texts:
        ids, _ = tokenizer.encode_batch([text])
        first = random.integers(len(ids) % tokens + 1) if len(ids) > tokens else 0
        whole = [ids[a : a + tokens] for a in range(first, len(ids), tokens)]
        # Take only whole chunks of a long row, beginning at a random token.
        kept = [chunk for chunk in whole if len(chunk) == min(tokens, max(len(ids), 2))]
        chunks.append([kept[i] for i in random.permutation(len(kept))])
        if sum(map(bool, chunks)) == rows:
            break
    found = [row[turn] for turn in range(max(map(len, chunks), default=0)) for row in chunks if turn < len(row)]
    if not found:
        raise Refused(
            f"{data}: column {column!r} has no text of two tokens or more to calibrate with; give another column"
        )
    return found[:rows]


def _drawn(data: Path, column: str, rows: int, random: np.random.Generator) -> list[str]:
    """Draw `rows` random rows that have text; returns their texts in random order.

    Each row gets a random number, and the rows with the smallest numbers are taken.
    """
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
