"""Rows ahead of the engine: tokenized a slice at a time, planned a window at a time, sent a piece at a time."""

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchinfer.engine.request import Requests, RowError
from batchinfer.jobs.rows.duplicates import Followers, leaders
from batchinfer.jobs.rows.length_figures import JobPlan
from batchinfer.jobs.rows.run_order import depth_first
from batchinfer.jobs.rows.token_file import StoredRequests, TokenFile, cut
from batchinfer.jobs.tables.table import Table


class Prompts(Protocol):
    """Turns rows of the input into requests."""

    @property
    def columns(self) -> list[str]: ...
    def tokenize(self, first_row: int, batch: pa.RecordBatch) -> tuple[Requests, dict[int, RowError]]: ...


@dataclass(frozen=True)
class Limits:
    """How much there is of what waits. A window or a piece is full at so many rows or prompt tokens."""

    slice_rows: int = 2048  # between two slices the parent looks after what the engine finished
    piece_rows: int = 32_768  # in memory, of the parent and of the engine
    piece_tokens: int = 1 << 22
    window_rows: int = 1 << 20  # in a file, a gigabyte of it at most
    window_tokens: int = 1 << 28


LIMITS = Limits()


@dataclass(frozen=True, eq=False)
class _Window:
    """Neighbouring rows that were planned together."""

    prompts: StoredRequests
    pieces: deque[NDArray[np.int64]]  # places in `prompts`, in the order to run: those not sent yet


class Windows:
    """Reads ahead: while one window is sent, piece by piece, the next one is tokenized. Rows that an earlier run has
    done are left out.

    All is one window, unless it is larger than a file is meant to be. Memory holds some words a row of two windows.
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
    ) -> None:
        """`done` [rows of the table] need not run; of each other row so many `samples` are computed. `folder` is for
        token ids, and left empty."""
        self._prompts, self._done, self._samples, self._limits = prompts, done, samples, limits
        self._batches = table.batches(prompts.columns, max(1, limits.slice_rows // samples))
        self._path = folder / "prompts.arrow"
        self._deduplicate = deduplicate
        self._file: TokenFile | None = None  # of the window that is being read
        self._waiting: _Window | None = None
        self._sending: _Window | None = None
        self._read_all = False
        self.rows_read = 0
        self.plan = JobPlan(block_size, *np.zeros((3, 1), np.int64))  # of the windows so far
        self.followers = Followers()  # of their rows
        self.seconds = 0.0  # spent reading, tokenizing and planning

    @property
    def reading(self) -> bool:
        """True while `read` has something to do: rows are left, and no window waits."""
        return self._waiting is None and not self._read_all

    @property
    def over(self) -> bool:
        """True once the last piece was taken."""
        return self._read_all and self._waiting is None and not (self._sending and self._sending.pieces)

    def read(self) -> dict[int, RowError]:
        """Tokenize one slice more, and plan the window that this completes; the errors of rows that cannot run.

        Raises `OSError` where their token ids cannot be written.
        """
        started = time.monotonic()
        errors = self._read_slice()
        if self._file is not None and (self._full(self._file) or self._read_all):
            prompts = self._file.complete()
            self._file = None
            self._waiting = self._planned(prompts)
        self.seconds += time.monotonic() - started
        return errors

    def next_piece(self) -> Requests | None:
        """The next rows to send; None where none are ready."""
        if not (self._sending and self._sending.pieces):
            self._sending, self._waiting = self._waiting, None
        if self._sending is None:
            return None
        return self._sending.prompts.take(self._sending.pieces.popleft())

    def pass_over(self) -> None:
        """The window that waits, if there is one, is not sent."""
        self._waiting, self.followers = None, Followers()

    def close(self) -> None:
        """Leave no file behind."""
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
        if len(requests):
            self._file = self._file or TokenFile(self._path)
            self._file.append(requests)
        return errors

    def _full(self, file: TokenFile) -> bool:
        return file.rows >= self._limits.window_rows or file.tokens >= self._limits.window_tokens

    def _planned(self, prompts: StoredRequests) -> _Window:
        own = np.arange(len(prompts))
        leader = leaders(prompts) if self._deduplicate else own
        led = np.flatnonzero(leader != own)
        led = led[np.argsort(leader[led], kind="stable")]
        self.followers.add(prompts.rows[leader[led]], prompts.rows[led])
        order = depth_first(prompts, np.flatnonzero(leader == own))
        self.plan += JobPlan.of(prompts, order, self.plan.block_size)
        # The engine has a prompt for each sample.
        most_rows, most_tokens = self._limits.piece_rows // self._samples, self._limits.piece_tokens // self._samples
        pieces = cut(prompts.lengths[order], max(1, most_rows), most_tokens)
        return _Window(prompts, deque(order[piece] for piece in pieces))
