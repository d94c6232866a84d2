"""`Batch`: the tensors of one step. The scheduler fills in all of them; the model runner only reads them.

A place is a sequence's row in the engine's sequence table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchinfer.kernels.attention_shape import AttentionShape
from batchinfer.kernels.backend import AttentionBatch
from batchinfer.kernels.grain import MIN_ROWS, padded_logits
from batchinfer.kernels.logits import LogitsChanges
from batchinfer.kernels.ragged import Ints, ranges
from batchinfer.kernels.sampling import SamplingBatch
from batchinfer.kernels.scores import ScoredTokens
from batchinfer.kernels.state_pool import StateBatch


@dataclass(frozen=True)
class PromptChunk:
    """A chunk of a prompt: the tokens [start, end) of a sequence, which begin at `row` of the step's tokens.

    Twins are sequences with the same prompt: it is computed once, and they get copies of its last blocks.
    """

    place: int
    start: int
    end: int
    row: int
    twins: tuple[int, ...] = ()  # places of the twins; only in the last chunk of a prompt


@dataclass(frozen=True)
class Queries:
    """The tokens after the prompt that d sequences compute in this step: decoded tokens, then drafts."""

    places: Ints  # [d]
    first: Ints  # [d] position of each sequence's first token of this step
    counts: Ints  # [d] number of tokens, at least one
    drafts: Ints  # [d] number of drafts, the last of these tokens
    left: Ints | None = None  # [sum of counts] the state that each token leaves; None if the model has no states

    def __len__(self) -> int:
        return self._tokens

    @cached_property
    def _tokens(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def all_places(self) -> Ints:
        """Place of each token's sequence."""
        return self.places if len(self) == len(self.places) else np.repeat(self.places, self.counts)

    @cached_property
    def positions(self) -> Ints:
        """Position of each token."""
        return self.first if len(self) == len(self.places) else ranges(self.first, self.counts)[0]


@dataclass(frozen=True)
class Copies:
    """Blocks and states that sequences which go on from others get copies of, after a step."""

    blocks: Ints  # [c]
    into: Ints  # [c] the blocks that they are copied to
    states: Ints  # [f]
    into_states: Ints  # [f]; arbitrary if the model has no states


@dataclass(frozen=True)
class LabelStep:
    """What a step finds out of rows that choose from labels: the log-probabilities of m targets."""

    rows: Ints  # [s] rows of the step whose logits are wanted
    scored: ScoredTokens  # m tokens; their rows count from 0 to s - 1
    owners: Ints  # [m] place of the row that each target belongs to
    epochs: Ints  # [m] of these places when the step was scheduled
    targets: Ints  # [m] number of each among its row's targets
    copies: Copies


@dataclass(frozen=True)
class PromptSpan:
    """Tokens [first, end) of a prompt whose log-probabilities a step finds, in n neighbouring rows of the wanted ones.

    Behind tiles that later rows share, it finds those of the tokens with which these rows go on, too.
    """

    chunk: PromptChunk
    first: int
    end: int
    row: int  # number of the first token's row among the p wanted rows
    tiles: tuple[tuple[int, int, int], ...] = ()  # (index of the tile, its first of the m known tokens, and their end)


@dataclass(frozen=True)
class ScoringStep:
    """The tokens whose log-probabilities a step finds: a sampled ones, and m known ones of prompts.

    The first p known tokens are those that follow p rows of the step, one each.
    """

    sampled: Ints  # [a] rows of logits, ascending
    sampled_rows: Tensor  # [a] int64, the same on the device, padded with row 0
    rows: Ints  # [p] rows of the step that predict known tokens; their logits are computed behind all others
    known: ScoredTokens  # m tokens; their rows count from 0 to p - 1
    likeliest: int  # number of likeliest tokens that are wanted of each row
    spans: tuple[PromptSpan, ...]  # of all chunks that have any, and of those that end a row that generates nothing


@dataclass(frozen=True)
class Batch:
    """One step of T tokens: chunks of prompts first, then decoded tokens and drafts, then padding."""

    tokens: Tensor  # [T] int64; arbitrary where the newest token exists only on the device (see `late_rows`)
    positions: Tensor  # [T] int64, 0 for padding
    slots: Tensor  # [T] int64, slots of the KV cache for the tokens' keys and values; in block 0 for padding
    attention: dict[AttentionShape, AttentionBatch]
    sampled: Tensor  # [S] int64, rows of the tokens whose logits are computed; padded with row 0
    sampling: SamplingBatch | None  # parameters of the first r rows of `sampled`; None if all are greedy
    places: Tensor  # [r] int64, the same as `sequences`, on the device
    copied: Tensor  # [c] int64, blocks to be copied after the step
    copies: Tensor  # [c] int64, the blocks that they are copied to
    late_rows: Tensor  # [l] int64, rows of tokens that only the device knows yet
    late_places: Tensor  # [l] int64, places of these tokens' sequences
    chunks: tuple[PromptChunk, ...]
    queries: Queries
    sequences: Ints  # [r] place for each row of `sampled`; a sequence with drafts has several rows
    epochs: Ints  # [r] tells which sequence had the place when the step was scheduled: places are reused
    prompt_tokens: int
    states: StateBatch | None = None  # of layers that keep states; None if the model has none
    changes: LogitsChanges | None = None  # of the logits of the first r rows of `sampled`; None if there are none
    # Finds which tokens grammars allow behind the first r rows of `sampled`: int32 [r, V / 32], a bit for each token.
    # It is called while a GPU computes the logits. None if no row follows a grammar.
    allowed: Callable[[], Tensor] | None = None
    labels: LabelStep | None = None  # its s rows follow the first r of `sampled`; None if no row has choices
    # Its p rows follow all others of `sampled`, behind padding of these. None: no log-probability of a token is wanted.
    scoring: ScoringStep | None = None
    logits_grain: int = MIN_ROWS  # the rows of logits are padded to a multiple of this

    @property
    def query_tokens(self) -> int:
        """Number of decoded tokens and drafts."""
        return len(self.queries)

    @property
    def first_rows(self) -> int:
        """Number of rows of logits that tokens are sampled from or labels scored by, without padding."""
        return len(self.sequences) + (0 if self.labels is None else len(self.labels.rows))

    @property
    def logits_rows(self) -> int:
        """Number of rows of logits; padding counts where other rows follow."""
        known = 0 if self.scoring is None else len(self.scoring.rows)
        return padded_logits(self.first_rows, self.logits_grain) + known if known else self.first_rows

    @cached_property
    def drafted(self) -> int:
        """Number of drafts to verify."""
        return int(self.queries.drafts.sum())


def as_tensor(array: NDArray[np.generic]) -> Tensor:
    """The same numbers, on the host; in the same memory where they are contiguous."""
    return torch.from_numpy(np.ascontiguousarray(array))
