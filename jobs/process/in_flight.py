"""The rows in flight: those that were sent to the engine and are unfinished."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.prompts import END_TOKENS, ends_of
from batchinfer.engine.request import Requests
from batchinfer.jobs.results.schema import KEY
from batchinfer.jobs.rows.answer_keys import Keys, answer_keys


@dataclass
class _Sent:
    """A chunk of rows that was sent to the engine."""

    requests: Requests  # as they were sent; kept in case another engine must run them again
    unfinished: NDArray[np.bool_]  # [n] in the order of `requests`
    rows: NDArray[np.int64]  # [n] ordinals of the rows, ascending
    indices: NDArray[np.int64]  # [n] index in `requests` of each of `rows`

    @property
    def left(self) -> int:
        return int(self.unfinished.sum())

    def find(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the rows that are in this chunk. Returns (their indices in `rows`, their indices in `requests`)."""
        near = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        mine = np.flatnonzero(self.rows[near] == rows)
        return mine, self.indices[near[mine]]


class InFlight:
    """Keeps each chunk of rows from when it is sent to the engine until its last row has ended."""

    def __init__(self) -> None:
        self._sent: list[_Sent] = []
        self._begun: set[int] = set()

    def __len__(self) -> int:
        """Number of unfinished rows."""
        return sum(sent.left for sent in self._sent)

    @property
    def enough(self) -> bool:
        """True while more than half of the last chunk is unfinished, so that the engine needs no more rows yet."""
        return bool(self._sent) and self._sent[-1].left > len(self._sent[-1].requests) // 2

    @property
    def begun(self) -> list[int]:
        """Ordinals of the rows that began and did not end, ascending."""
        return sorted(self._begun)

    def add(self, requests: Requests) -> None:
        """Add a chunk of one row or more that is sent to the engine."""
        indices = np.argsort(requests.rows)
        self._sent.append(_Sent(requests, np.ones(len(requests), np.bool_), requests.rows[indices], indices))

    def begin(self, rows: list[int]) -> None:
        """Note that the engine has begun these rows."""
        self._begun.update(rows)

    def begin_again(self) -> None:
        """Note that another engine takes over, which has begun no row yet."""
        self._begun.clear()

    def end(self, rows: set[int]) -> None:
        """Remove these rows, which are finished or given up."""
        ended = np.fromiter(rows, np.int64, len(rows))
        for sent in self._sent:
            sent.unfinished[sent.find(ended)[1]] = False
        self._sent = [sent for sent in self._sent if sent.left]
        self._begun.difference_update(rows)

    def requests(self, alone: list[int]) -> list[Requests]:
        """Return the requests of unfinished rows, chunk by chunk: only rows in `alone`, or all if `alone` is empty."""
        rests = [sent.requests.take(np.flatnonzero(sent.unfinished)) for sent in self._sent]
        if alone:
            rests = [rest.take(np.flatnonzero(np.isin(rest.rows, alone))) for rest in rests]
        return [rest for rest in rests if len(rest)]

    def answer_keys(self, rows: NDArray[np.int64]) -> Keys:
        """Return the answer keys of these rows [n]."""
        found = np.zeros(len(rows), f"S{KEY.type.byte_width}")
        for sent in self._sent:
            mine, indices = sent.find(rows)
            found[mine] = answer_keys(sent.requests.take(indices))
        return found

    def prompt_tokens(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the lengths of these rows' prompts [n]."""
        found = np.zeros(len(rows), np.int32)
        for sent in self._sent:
            mine, indices = sent.find(rows)
            found[mine] = np.diff(sent.requests.offsets)[indices]
        return found

    def labels(self, rows: NDArray[np.int64]) -> list[list[str]] | None:
        """Return the labels of each of these rows; None if rows do not choose."""
        found: dict[int, list[str]] = {}
        for sent in self._sent:
            choices = sent.requests.choices
            if choices is None:
                return None
            mine, indices = sent.find(rows)
            found |= {place: choices.texts_of(i) for place, i in zip(mine.tolist(), indices.tolist(), strict=True)}
        return [found[place] for place in range(len(rows))]

    def prompt_ends(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the last tokens of these rows' prompts [n, END_TOKENS], as `ends_of` gives them."""
        found = np.full((len(rows), END_TOKENS), -1, np.int32)
        for sent in self._sent:
            mine, indices = sent.find(rows)
            found[mine] = ends_of(sent.requests, indices)
        return found
