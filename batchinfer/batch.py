"""`Batch`: the tensors of one step. The scheduler fills all of it; the runner only reads."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from batchinfer.kernels.backend import AttentionBatch
from batchinfer.kernels.sampling import SamplingBatch

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Prompt tokens [start, end) of a sequence, at `row` of the step's tokens."""

    place: int
    start: int
    end: int
    row: int


@dataclass(frozen=True)
class Batch:
    """T tokens, prompt pieces first, then one token of each decoding sequence, then padding."""

    tokens: Tensor  # [T] int64; of a sequence whose newest token the host does not know yet, anything
    positions: Tensor  # [T] int64, 0 for padding
    slots: Tensor  # [T] int64, where their keys and values go; in block 0 for padding
    attention: dict[int | None, AttentionBatch]  # by the layers' windows
    sampled: Tensor  # [S] int64, the rows of tokens that are followed by a new one; padded with row 0
    sampling: SamplingBatch | None  # of the first r rows of sampled; None if all are greedy
    places: Tensor  # [r] int64, `sequences` beside the other tensors
    pieces: tuple[Piece, ...]
    sequences: Ints  # [r] places in the sequence table, in the order of sampled; decoding ones last
    rows: Ints  # [r] the rows that they were when the step was put together
    prompt_tokens: int
    decode_tokens: int

    @property
    def decoding(self) -> Ints:
        """Places of the sequences that decode, in the order of their tokens."""
        return self.sequences[len(self.sequences) - self.decode_tokens :]
