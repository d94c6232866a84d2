"""The rows that the engine has: which of them began, and which are unfinished."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.request import Requests


@dataclass
class _Sent:
    """A piece that was sent."""

    requests: Requests  # what the engine got, should another one need it
    unfinished: NDArray[np.bool_]  # [n] by place in `requests`
    rows: NDArray[np.int64]  # [n] their ordinals, ascending
    places: NDArray[np.int64]  # [n] and where they are in `requests`

    @property
    def left(self) -> int:
        return int(self.unfinished.sum())

    def find(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of these rows are in the piece: (places in `rows`, places in `requests`)."""
        near = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        mine = np.flatnonzero(self.rows[near] == rows)
        return mine, self.places[near[mine]]


class UnderWay:
    """Pieces are added as they are sent, and forgotten when their last row has ended."""

    def __init__(self) -> None:
        self._sent: list[_Sent] = []
        self._begun: set[int] = set()

    def __len__(self) -> int:
        """Unfinished rows."""
        return sum(sent.left for sent in self._sent)

    @property
    def enough(self) -> bool:
        """True while more than half of the last piece is unfinished."""
        return bool(self._sent) and self._sent[-1].left > len(self._sent[-1].requests) // 2

    @property
    def begun(self) -> list[int]:
        """The rows that began and did not end, in order."""
        return sorted(self._begun)

    def add(self, requests: Requests) -> None:
        """The engine gets this piece, of one row at least."""
        places = np.argsort(requests.rows)
        self._sent.append(_Sent(requests, np.ones(len(requests), np.bool_), requests.rows[places], places))

    def begin(self, rows: list[int]) -> None:
        """The engine has begun these rows."""
        self._begun.update(rows)

    def begin_again(self) -> None:
        """Another engine takes over: it has begun nothing yet."""
        self._begun.clear()

    def end(self, rows: set[int]) -> None:
        """These rows are finished, one way or the other."""
        ended = np.fromiter(rows, np.int64, len(rows))
        for sent in self._sent:
            sent.unfinished[sent.find(ended)[1]] = False
        self._sent = [sent for sent in self._sent if sent.left]
        self._begun.difference_update(rows)

    def requests(self, alone: list[int]) -> list[Requests]:
        """Of unfinished rows, piece by piece: of those in `alone`, or of all where it is empty."""
        rests = [sent.requests.take(np.flatnonzero(sent.unfinished)) for sent in self._sent]
        if alone:
            rests = [rest.take(np.flatnonzero(np.isin(rest.rows, alone))) for rest in rests]
        return [rest for rest in rests if len(rest)]

    def prompt_tokens(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """[n] the lengths of these rows' prompts."""
        found = np.zeros(len(rows), np.int32)
        for sent in self._sent:
            mine, places = sent.find(rows)
            found[mine] = np.diff(sent.requests.offsets)[places]
        return found
