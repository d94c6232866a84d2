"""The rows in flight: those that were sent to the engine and are unfinished."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.request import Requests
from batchinfer.jobs.rows.asked import Asked


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

    def __init__(self, thinking: bool = False) -> None:
        """Keep nothing yet; `thinking` says whether thinking is looked for in answers."""
        self._thinking = thinking
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

    def asked(self, rows: NDArray[np.int64]) -> Asked:
        """Return what the results of these rows, one or more in flight, take from their requests."""
        found = [(sent, *sent.find(rows)) for sent in self._sent]
        parts = [Asked.of(sent.requests.take(indices), self._thinking) for sent, _, indices in found if len(indices)]
        return Asked.joined(parts).take(np.argsort(np.concatenate([mine for _, mine, _ in found])))
