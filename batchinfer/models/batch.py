"""`Batch`: the tensors of one step. The scheduler fills all of it; the runner only reads."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchinfer.kernels.backend import AttentionBatch
from batchinfer.kernels.ragged import Ints, ranges
from batchinfer.kernels.sampling import SamplingBatch


@dataclass(frozen=True)
class Piece:
    """Prompt tokens [start, end) of a sequence, at `row` of the step's tokens."""

    place: int
    start: int
    end: int
    row: int
    twins: tuple[int, ...] = ()  # places of sequences that get copies of it; then it is the end of their prompts


@dataclass(frozen=True)
class Queries:
    """Single queries of d sequences: tokens that stand at `first` and behind, the last `drafts` of them drafts."""

    places: Ints  # [d]
    first: Ints  # [d] positions
    counts: Ints  # [d] tokens, at least one
    drafts: Ints  # [d]

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def all_places(self) -> Ints:
        """The place of each query."""
        return np.repeat(self.places, self.counts)

    @property
    def positions(self) -> Ints:
        """The position of each query."""
        return ranges(self.first, self.counts)[0]


@dataclass(frozen=True)
class Batch:
    """T tokens: prompt pieces first, then single queries, then padding."""

    tokens: Tensor  # [T] int64; of a sequence whose newest token the host does not know yet, anything
    positions: Tensor  # [T] int64, 0 for padding
    slots: Tensor  # [T] int64, where their keys and values go; in block 0 for padding
    attention: dict[int | None, AttentionBatch]  # by the layers' windows
    sampled: Tensor  # [S] int64, the rows of tokens that are followed by a new one; padded with row 0
    sampling: SamplingBatch | None  # of the first r rows of sampled; None if all are greedy
    places: Tensor  # [r] int64, `sequences` beside the other tensors
    copied: Tensor  # [c] int64, blocks whose contents go to those of `copies`, when they are computed
    copies: Tensor  # [c] int64
    late_rows: Tensor  # [l] int64, the rows of tokens that only the device knows
    late_places: Tensor  # [l] int64, the places whose newest tokens they are
    pieces: tuple[Piece, ...]
    queries: Queries
    sequences: Ints  # [r] places in the sequence table, in the order of sampled; several times where it has drafts
    epochs: Ints  # [r] the sequences that had these places when the step was put together
    prompt_tokens: int

    @property
    def query_tokens(self) -> int:
        """Tokens that were generated, or drafted."""
        return len(self.queries)

    @property
    def drafted(self) -> int:
        """Drafts to be verified."""
        return int(self.queries.drafts.sum())


def as_tensor(array: NDArray[np.generic]) -> Tensor:
    """The same numbers, on the host; in the same memory where they are contiguous."""
    return torch.from_numpy(np.ascontiguousarray(array))
