"""The figures of a whole job's plan, counted window by window."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.jobs.rows.run_order import shared_tiles
from batchinfer.jobs.rows.token_file import StoredRequests
from batchinfer.kernels.grain import TILE


@dataclass(frozen=True, eq=False)
class JobPlan:
    """Figures of the rows planned so far: exact, and no larger than the longest row, whatever the number of rows."""

    block_size: int
    lengths: NDArray[np.int64]  # [longest prompt + 1] how many prompts have so many tokens, duplicates too
    run_lengths: NDArray[np.int64]  # the same of the rows that run
    reservations: NDArray[np.int64]  # [most blocks + 1] how many rows that run may come to hold so many KV blocks
    duplicates: int = 0  # rows that get the result of another one
    duplicate_tokens: int = 0  # of their prompts
    shared_tokens: int = 0  # of prompts that run, with the same place in the prompt that runs before
    groups: int = 0  # of rows that run, two or more, with the same first tile
    grouped_rows: int = 0  # in these groups

    @staticmethod
    def of(prompts: StoredRequests, order: NDArray[np.int64], block_size: int) -> "JobPlan":
        """The figures of one window, of which the rows at the places `order` run, in that order."""
        limits = np.array([params.max_tokens for params in prompts.params], np.int64)[prompts.param_index]
        blocks = -(-(prompts.lengths + limits)[order] // block_size)
        shared = shared_tiles(prompts, order)
        joins = shared > 0  # the group of the row before
        groups = int(joins.sum() - (joins[1:] & joins[:-1]).sum())
        return JobPlan(
            block_size,
            np.bincount(prompts.lengths, minlength=1),
            np.bincount(prompts.lengths[order], minlength=1),
            np.bincount(blocks, minlength=1),
            duplicates=len(prompts) - len(order),
            duplicate_tokens=int(prompts.lengths.sum() - prompts.lengths[order].sum()),
            shared_tokens=TILE * int(shared.sum()),
            groups=groups,
            grouped_rows=groups + int(joins.sum()),
        )

    def __add__(self, other: "JobPlan") -> "JobPlan":
        """The figures of both, which have the same block size."""
        assert self.block_size == other.block_size
        return JobPlan(
            self.block_size,
            _sum(self.lengths, other.lengths),
            _sum(self.run_lengths, other.run_lengths),
            _sum(self.reservations, other.reservations),
            self.duplicates + other.duplicates,
            self.duplicate_tokens + other.duplicate_tokens,
            self.shared_tokens + other.shared_tokens,
            self.groups + other.groups,
            self.grouped_rows + other.grouped_rows,
        )

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
