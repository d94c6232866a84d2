"""Rows ahead of the engine: tokenized a slice at a time, planned and sent a window at a time."""

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchinfer.jobs.planner import JobPlan, plan_window
from batchinfer.jobs.reader import Table
from batchinfer.request import Requests, RowError

SLICE_ROWS = 2048  # between two slices the parent looks after what the engine finished
WINDOW_ROWS = 32_768
WINDOW_TOKENS = 1 << 22


class Prompts(Protocol):
    """Turns rows of the input into requests."""

    @property
    def columns(self) -> list[str]: ...
    def tokenize(self, first_row: int, batch: pa.RecordBatch) -> tuple[Requests, dict[int, RowError]]: ...


@dataclass(frozen=True)
class Window:
    """Neighbouring rows, ordinals `first` to before `end`: those to run, in order, and those refused.

    Rows that an earlier run has done are in neither.
    """

    first: int
    end: int
    requests: Requests
    errors: dict[int, RowError]
    prompt_tokens: NDArray[np.int32]  # [end - first], 0 for refused rows


class Windows:
    """Reads ahead. A window ends at `WINDOW_ROWS` rows or `WINDOW_TOKENS` prompt tokens, so memory is bounded.

    Each sample of a row counts, as the engine has a prompt for each.
    """

    def __init__(self, table: Table, prompts: Prompts, block_size: int, done: NDArray[np.bool_], samples: int) -> None:
        """`done` [rows of the table] need not run; of each other row so many `samples` are computed."""
        self._prompts, self._done, self._samples = prompts, done, samples
        self._batches = table.batches(prompts.columns, max(1, SLICE_ROWS // samples))
        self._slices: list[Requests] = []
        self._errors: dict[int, RowError] = {}
        self._first = self._end = 0
        self.exhausted = False
        self.plan = JobPlan(block_size, np.zeros(1, np.int64), np.zeros(1, np.int64))  # of the windows so far
        self.seconds = 0.0  # spent reading, tokenizing and planning

    def read(self) -> Window | None:
        """Tokenize one slice more; the window that this completes, or None where it does not."""
        started = time.monotonic()
        self._read_slice()
        tokens = sum(len(requests.token_ids) for requests in self._slices)
        rows = self._end - self._first
        full = rows * self._samples >= WINDOW_ROWS or tokens * self._samples >= WINDOW_TOKENS
        window = self._complete() if self._slices and (full or self.exhausted) else None
        self.seconds += time.monotonic() - started
        return window

    def _read_slice(self) -> None:
        numbered = next(self._batches, None)
        if numbered is None:
            self.exhausted = True
            return
        first, batch = numbered
        self._end = first + len(batch)
        done = self._done[first : self._end]
        if done.all():
            if not self._slices:
                self._first = self._end
            return
        requests, errors = self._prompts.tokenize(first, batch)
        if done.any():
            requests = requests.take(np.flatnonzero(~self._done[requests.rows]))
            errors = {row: error for row, error in errors.items() if not self._done[row]}
        self._slices.append(requests)
        self._errors.update(errors)

    def _complete(self) -> Window:
        requests = join(self._slices)
        prompt_tokens = np.zeros(self._end - self._first, np.int32)
        prompt_tokens[requests.rows - self._first] = np.diff(requests.offsets)
        window = Window(self._first, self._end, plan_window(requests), self._errors, prompt_tokens)
        self.plan += JobPlan.of(requests, self.plan.block_size)
        self._slices, self._errors, self._first = [], {}, self._end
        return window


def join(slices: list[Requests]) -> Requests:
    """The requests of all slices, one after the other."""
    params = tuple(dict.fromkeys(p for requests in slices for p in requests.params))
    place = {p: i for i, p in enumerate(params)}
    lengths = np.concatenate([np.diff(requests.offsets) for requests in slices])
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Requests(
        np.concatenate([requests.rows for requests in slices]),
        np.concatenate([requests.token_ids for requests in slices]),
        offsets,
        np.concatenate([requests.seeds for requests in slices]),
        params,
        np.concatenate(
            [np.array([place[p] for p in r.params], np.int32)[r.param_index] for r in slices], dtype=np.int32
        ),
    )
