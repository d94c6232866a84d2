"""`Batch`: the tensors of one step. The scheduler fills all of it; the runner only reads."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from batchinfer.kernels.attention import DecodeBlocks, PromptTiles
from batchinfer.kernels.sampling import SamplingBatch


@dataclass(frozen=True)
class Batch:
    """T tokens, prompt pieces first, then one token of each decoding sequence, then padding."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64, 0 for padding
    slots: Tensor  # [T] int64, where their keys and values go; in block 0 for padding
    tiles: tuple[PromptTiles, ...]
    decode: dict[int | None, DecodeBlocks]  # by the layers' windows; empty if nothing decodes
    sampled: Tensor  # [S] int64, the rows of tokens that are followed by a new one; padded with row 0
    sampling: SamplingBatch | None  # of the first r rows of sampled; None if all are greedy
    sequences: NDArray[np.int64]  # [r] places in the sequence table, in the order of sampled; decoding ones last
    computed: NDArray[np.int64]  # [p, 2] of sequences in prefill: place, and how far the step brings it
    prompt_tokens: int
    decode_tokens: int
