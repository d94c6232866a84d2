"""Preparing rows for the engine: they are tokenized in slices, ordered in windows, and sent in chunks."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchinfer.engine.request import Requests, RowError
from batchinfer.jobs.rows.duplicates import Followers, leaders
from batchinfer.jobs.rows.length_figures import LengthFigures
from batchinfer.jobs.rows.reuse import Reuse
from batchinfer.jobs.rows.run_order import depth_first
from batchinfer.jobs.rows.token_file import StoredRequests, TokenFile, cut
from batchinfer.jobs.tables.table import Table
from batchinfer.kernels.grain import TILE
from batchinfer.kernels.ragged import Ints


class Prompts(Protocol):
    """The interface of what turns rows of the input into requests."""

    @property
    def columns(self) -> list[str]: ...
    def tokenize(self, first_row: int, batch: pa.RecordBatch) -> tuple[Requests, dict[int, RowError]]: ...


@dataclass(frozen=True)
class Limits:
    """Sizes of slices, chunks and windows. A chunk or a window is full when it reaches its limit of rows or tokens."""

    slice_rows: int = 2048  # between two slices, the job handles the rows that the engine finished
    chunk_rows: int = 32_768  # a chunk is in memory, in the job's process and in the engine's
    chunk_tokens: int = 1 << 22
    window_rows: int = 1 << 20  # a window is in a file of at most one gigabyte
    window_tokens: int = 1 << 28
    window_grammar_bytes: int = 1 << 26  # of the different grammars of a window's rows, which are in memory


LIMITS = Limits()


@dataclass(frozen=True, eq=False)
class _Window:
    """Consecutive rows of the table that were ordered together."""

    prompts: StoredRequests
    chunks: deque[NDArray[np.int64]]  # not sent yet; indices in `prompts`, in the order to run


class Windows:
    """Reads ahead: while the chunks of one window are sent, the next window is tokenized. Rows that are done are left
    out.

    A job is one window, unless it exceeds the limits of a window. Memory holds a few numbers for each row of two
    windows.
    """

    def __init__(
        self,
        table: Table,
        prompts: Prompts,
        block_size: int,
        done: NDArray[np.bool_],
        folder: Path,
        deduplicate: bool = True,
        samples: int = 1,
        limits: Limits = LIMITS,
        reuse: Reuse | None = None,
        grain: int = TILE,
    ) -> None:
        """`done` [rows of the table] says which rows need not run, and `reuse` has answers of others. Most rows have
        `samples` samples. Files of token ids are written in `folder`, and none is left there. Prompts share their
        beginnings in tiles of `grain` tokens."""
        self._prompts, self._done, self._limits = prompts, done, limits
        self._batches = table.batches(prompts.columns, max(1, limits.slice_rows // samples))
        self._path = folder / "prompts.arrow"
        self._deduplicate = deduplicate
        self._reuse = reuse
        self._reused: list[tuple[Ints, Ints]] = []  # rows and the places of their answers, not taken yet
        self._file: TokenFile | None = None  # for the window that is being read
        self._waiting: _Window | None = None
        self._sending: _Window | None = None
        self._read_all = False
        self.rows_read = 0
        self.figures = LengthFigures(block_size, grain, *np.zeros((3, 1), np.int64))  # of all windows read so far
        self.followers = Followers()  # duplicates of their rows
        self.rows_reused = 0
        self.seconds = 0.0  # spent reading, tokenizing and ordering

    @property
    def reading(self) -> bool:
        """True while `read` has work to do: rows of the table are left, and no window waits to be sent."""
        return self._waiting is None and not self._read_all

    @property
    def over(self) -> bool:
        """True once the last chunk was taken."""
        return self._read_all and self._waiting is None and not (self._sending and self._sending.chunks)

    def read(self) -> dict[int, RowError]:
        """Tokenize one more slice, and order the window if that completes it. Returns the errors of rows that cannot
        run.

        Raises `OSError` if token ids cannot be written.
        """
        started = time.monotonic()
        errors = self._read_slice()
        if self._file is not None and (self._full(self._file) or self._read_all):
            prompts = self._file.complete()
            self._file = None
            self._waiting = self._ordered(prompts)
        self.seconds += time.monotonic() - started
        return errors

    def next_chunk(self) -> Requests | None:
        """Take the next chunk of rows to send; None if no window is ready."""
        if not (self._sending and self._sending.chunks):
            self._sending, self._waiting = self._waiting, None
        if self._sending is None:
            return None
        return self._sending.prompts.take(self._sending.chunks.popleft())

    def take_reused(self) -> Iterator[pa.RecordBatch]:
        """Yield the rows with reused answers, in batches of a part's columns: nothing before there are enough of them,
        since each part of an earlier job is read once for all."""
        enough = sum(len(rows) for rows, _ in self._reused) >= self._limits.window_rows
        if self._reuse is not None and self._reused and (enough or not self.reading):
            rows, places = map(np.concatenate, zip(*self._reused, strict=True))
            self._reused = []
            yield from self._reuse.answers(rows, places)

    def pass_over(self) -> None:
        """Drop the window that waits, if there is one, without sending it, and the rows with reused answers."""
        self._waiting, self.followers, self._reused = None, Followers(), []

    def close(self) -> None:
        """Remove the file of token ids."""
        if self._file is not None:
            self._file.close()

    def _read_slice(self) -> dict[int, RowError]:
        numbered = next(self._batches, None)
        if numbered is None:
            self._read_all = True
            return {}
        first, batch = numbered
        self.rows_read = first + len(batch)
        done = self._done[first : self.rows_read]
        if done.all():
            return {}
        requests, errors = self._prompts.tokenize(first, batch)
        if done.any():
            requests = requests.take(np.flatnonzero(~self._done[requests.rows]))
            errors = {row: error for row, error in errors.items() if not self._done[row]}
        if self._reuse is not None:
            places = self._reuse.places(requests)
            found = np.flatnonzero(places >= 0)
            self._reused.append((requests.rows[found], places[found]))
            self.rows_reused += len(found)
            requests = requests.take(np.flatnonzero(places < 0))
        if len(requests):
            self._file = self._file or TokenFile(self._path)
            self._file.append(requests)
        return errors

    def _full(self, file: TokenFile) -> bool:
        limits = self._limits
        full = file.rows >= limits.window_rows or file.tokens >= limits.window_tokens
        return full or file.grammar_bytes >= limits.window_grammar_bytes

    def _ordered(self, prompts: StoredRequests) -> _Window:
        own = np.arange(len(prompts))
        leader = leaders(prompts) if self._deduplicate else own
        led = np.flatnonzero(leader != own)
        led = led[np.argsort(leader[led], kind="stable")]
        self.followers.add(prompts.rows[leader[led]], prompts.rows[led])
        block_size, grain = self.figures.block_size, self.figures.grain
        order = depth_first(prompts, np.flatnonzero(leader == own), grain)
        self.figures += LengthFigures.of(prompts, order, block_size, grain)
        # The engine holds each prompt once for every sample.
        limits, sequences = self._limits, prompts.sequences[order]
        chunks = cut(prompts.lengths[order], limits.chunk_rows, limits.chunk_tokens, sequences)
        return _Window(prompts, deque(order[chunk] for chunk in chunks))
