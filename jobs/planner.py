"""The order in which rows run, and the figures of a whole job, counted window by window."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.request import Requests


def plan_window(requests: Requests) -> Requests:
    """The window in the order to run: longest prompts first, so that neighbours have near lengths and the long ones do
    not end up alone at the end; rows of one length in table order."""
    return requests.take(np.lexsort((requests.rows, -np.diff(requests.offsets))))


@dataclass(frozen=True, eq=False)
class JobPlan:
    """Figures of the rows seen so far: exact, and no larger than the longest row, whatever the number of rows."""

    block_size: int
    lengths: NDArray[np.int64]  # [longest prompt + 1] how many prompts have so many tokens
    reservations: NDArray[np.int64]  # [most blocks + 1] how many rows may come to hold so many KV blocks

    @staticmethod
    def of(requests: Requests, block_size: int) -> "JobPlan":
        """The figures of one window."""
        lengths = np.diff(requests.offsets)
        max_tokens = np.array([params.max_tokens for params in requests.params], np.int64)[requests.param_index]
        blocks = -(-(lengths + max_tokens) // block_size)
        return JobPlan(block_size, np.bincount(lengths), np.bincount(blocks))

    def __add__(self, other: "JobPlan") -> "JobPlan":
        """The figures of both, which have the same block size."""
        assert self.block_size == other.block_size
        return JobPlan(self.block_size, _sum(self.lengths, other.lengths), _sum(self.reservations, other.reservations))

    @property
    def rows(self) -> int:
        return int(self.lengths.sum())

    @property
    def prompt_tokens(self) -> int:
        return int(self.lengths @ np.arange(len(self.lengths)))

    def quantile(self, q: float) -> int:
        """The least length that a share `q` of the prompts do not exceed; 0 without rows."""
        return int(np.searchsorted(np.cumsum(self.lengths), max(q * self.rows, 1))) if self.rows else 0

    @property
    def buckets(self) -> dict[int, int]:
        """Rows by length, in order: power of two from 32 on -> how many prompts are as long as that or shorter, and
        longer than the edge before."""
        longest = len(self.lengths) - 1
        edges = [32]
        while edges[-1] < longest:
            edges.append(2 * edges[-1])
        below = [int(self.lengths[: edge + 1].sum()) for edge in edges]
        return {edge: rows - before for edge, rows, before in zip(edges, below, [0, *below], strict=False)}

    @property
    def padding_tokens(self) -> int:
        """Tokens to add for every prompt to be as long as its bucket's edge."""
        return sum(edge * rows for edge, rows in self.buckets.items()) - self.prompt_tokens

    def kv_cache_tokens(self, max_num_seqs: int) -> int:
        """Tokens of KV, in whole blocks, that the `max_num_seqs` largest rows take when all run at once to the end."""
        largest_first = self.reservations[::-1]
        before = np.cumsum(largest_first) - largest_first
        taken = np.minimum(largest_first, np.maximum(max_num_seqs - before, 0))
        blocks = np.arange(len(self.reservations))[::-1]
        return int(taken @ blocks) * self.block_size


def _sum(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    total = np.zeros(max(len(a), len(b)), np.int64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total
