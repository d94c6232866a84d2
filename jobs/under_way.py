"""The rows that the engine has: which of them began, and which are unfinished."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.jobs.windows import Window
from batchinfer.request import Requests


@dataclass
class _Sent:
    """A window that was sent."""

    first: int
    prompt_tokens: NDArray[np.int32]  # [rows of the window]
    requests: Requests  # what the engine got, should another one need it
    unfinished: NDArray[np.bool_]  # [rows of the window]

    @property
    def left(self) -> int:
        return int(self.unfinished.sum())


class UnderWay:
    """Windows are added as they are sent, and forgotten when their last row has ended."""

    def __init__(self) -> None:
        self._sent: list[_Sent] = []
        self._begun: set[int] = set()

    def __len__(self) -> int:
        """Unfinished rows."""
        return sum(sent.left for sent in self._sent)

    @property
    def enough(self) -> bool:
        """True while more than half of the last window is unfinished."""
        return bool(self._sent) and self._sent[-1].left > len(self._sent[-1].requests) // 2

    @property
    def begun(self) -> list[int]:
        """The rows that began and did not end, in order."""
        return sorted(self._begun)

    def add(self, window: Window) -> None:
        """The engine gets this window's requests."""
        unfinished = np.zeros(window.end - window.first, np.bool_)
        unfinished[window.requests.rows - window.first] = True
        self._sent.append(_Sent(window.first, window.prompt_tokens, window.requests, unfinished))

    def begin(self, rows: list[int]) -> None:
        """The engine has begun these rows."""
        self._begun.update(rows)

    def begin_again(self) -> None:
        """Another engine takes over: it has begun nothing yet."""
        self._begun.clear()

    def end(self, rows: set[int]) -> None:
        """These rows are finished, one way or the other."""
        for sent in self._sent:
            mine = [row - sent.first for row in rows if sent.first <= row < sent.first + len(sent.unfinished)]
            sent.unfinished[mine] = False
        self._sent = [sent for sent in self._sent if sent.left]
        self._begun.difference_update(rows)

    def requests(self, alone: list[int]) -> list[Requests]:
        """Of unfinished rows, window by window: of those in `alone`, or of all where it is empty."""
        rests = [
            sent.requests.take(np.flatnonzero(sent.unfinished[sent.requests.rows - sent.first])) for sent in self._sent
        ]
        if alone:
            rests = [rest.take(np.flatnonzero(np.isin(rest.rows, alone))) for rest in rests]
        return [rest for rest in rests if len(rest)]

    def prompt_tokens(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """[n] the lengths of these rows' prompts."""
        found = np.zeros(len(rows), np.int32)
        for sent in self._sent:
            mine = (rows >= sent.first) & (rows < sent.first + len(sent.prompt_tokens))
            found[mine] = sent.prompt_tokens[rows[mine] - sent.first]
        return found
