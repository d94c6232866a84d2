"""Figures about the prompt lengths of a whole job, counted window by window."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchinfer.jobs.rows.run_order import shared_tiles
from batchinfer.jobs.rows.token_file import StoredRequests
from batchinfer.kernels.grain import TILE


@dataclass(frozen=True, eq=False)
class LengthFigures:
    """Exact figures of the rows read so far, in memory proportional to the longest row, not to the number of rows."""

    block_size: int
    grain: int  # tokens of a tile that prompts share
    lengths: NDArray[np.int64]  # [longest prompt + 1] number of prompts by length, duplicates included
    run_lengths: NDArray[np.int64]  # the same for the samples that run
    # [most blocks + 1] number of samples that run, by the most KV blocks that a sample may need
    reservations: NDArray[np.int64]
    duplicates: int = 0  # rows that get the result of another row
    duplicate_tokens: int = 0  # tokens of their prompts
    shared_tokens: int = 0  # tokens that a prompt shares with the prompt that runs before it
    groups: int = 0  # groups of two or more rows that run and have the same first tile
    grouped_rows: int = 0  # rows in these groups
    label_tokens: int = 0  # tokens of all labels that the rows that run choose from
    sample_tokens: int = 0  # tokens of the prompts of all samples that run but the first of each row
    new_tokens: int = 0  # most tokens that all samples that run may have; 0 if they choose from labels

    @staticmethod
    def of(prompts: StoredRequests, order: NDArray[np.int64], block_size: int, grain: int = TILE) -> "LengthFigures":
        """Return the figures of one window, whose rows at the indices `order` run, in that order."""
        blocks, sequences, lengths = prompts.most_blocks(order, block_size), prompts.sequences[order], prompts.lengths
        shared = shared_tiles(prompts, order, grain)
        joins = shared > 0  # belongs to the group of the row before it
        groups = int(joins.sum() - (joins[1:] & joins[:-1]).sum())
        return LengthFigures(
            block_size,
            grain,
            np.bincount(lengths, minlength=1),
            np.bincount(np.repeat(lengths[order], sequences), minlength=1),
            np.bincount(np.repeat(blocks, sequences), minlength=1),
            duplicates=len(prompts) - len(order),
            duplicate_tokens=int(lengths.sum() - lengths[order].sum()),
            shared_tokens=grain * int(shared.sum()),
            groups=groups,
            grouped_rows=groups + int(joins.sum()),
            label_tokens=prompts.label_tokens(order),
            sample_tokens=int(lengths[order] @ (sequences - 1)),
            new_tokens=0 if prompts.labels is not None else int(prompts.max_tokens[order] @ sequences),
        )

    def __add__(self, other: "LengthFigures") -> "LengthFigures":
        """Return the figures of both together. They must have the same blocks and tiles."""
        assert (self.block_size, self.grain) == (other.block_size, other.grain)
        return LengthFigures(
            self.block_size,
            self.grain,
            _sum(self.lengths, other.lengths),
            _sum(self.run_lengths, other.run_lengths),
            _sum(self.reservations, other.reservations),
            self.duplicates + other.duplicates,
            self.duplicate_tokens + other.duplicate_tokens,
            self.shared_tokens + other.shared_tokens,
            self.groups + other.groups,
            self.grouped_rows + other.grouped_rows,
            self.label_tokens + other.label_tokens,
            self.sample_tokens + other.sample_tokens,
            self.new_tokens + other.new_tokens,
        )

    @property
    def rows(self) -> int:
        return int(self.lengths.sum())

    @property
    def prompt_tokens(self) -> int:
        return int(self.lengths @ np.arange(len(self.lengths)))

    def quantile(self, q: float) -> int:
        """Return the least length that a share `q` of the prompts do not exceed; 0 without rows."""
        return int(np.searchsorted(np.cumsum(self.lengths), max(q * self.rows, 1))) if self.rows else 0

    @property
    def buckets(self) -> dict[int, int]:
        """Prompts by length, ascending: longest prompt of a bucket -> number of prompts. The buckets end at the powers
        of two from 32 on."""
        longest = len(self.lengths) - 1
        edges = [32]
        while edges[-1] < longest:
            edges.append(2 * edges[-1])
        below = [int(self.lengths[: edge + 1].sum()) for edge in edges]
        return {edge: rows - before for edge, rows, before in zip(edges, below, [0, *below], strict=False)}

    def kv_cache_tokens(self, max_num_seqs: int) -> int:
        """Return the KV tokens, in whole blocks, that the `max_num_seqs` largest samples need if they run at the same
        time."""
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


def bucketed(counts: Mapping[int, int]) -> dict[str, int]:
    """Return how many answers have lengths in each bucket, as {longest of the bucket: answers}, ascending.

    `counts` maps a length to its number of answers. The buckets end at the powers of two, and none is empty.
    """
    found: Counter[int] = Counter()
    for length, count in counts.items():
        found[1 << max(0, length - 1).bit_length()] += count
    return {str(edge): found[edge] for edge in sorted(found) if found[edge]}
