"""`Requests` and `Completions`: the engine's input and output, as columns, without a Python object per row.

Free of torch: the parent process of a job imports this module.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.kernels.ragged import offsets_of, take_ragged


class FinishReason(IntEnum):
    """Why a row ended. The output column `finish_reason` holds these names in lower case."""

    STOP = 0
    LENGTH = 1
    ERROR = 2


@dataclass(frozen=True)
class RowError:
    """Why a row has no result: a stable code in snake_case, and a short message."""

    code: str
    message: str


@dataclass(frozen=True)
class Requests:
    """n tokenized rows. Row i's prompt is `token_ids[offsets[i]:offsets[i + 1]]`, never empty."""

    rows: NDArray[np.int64]  # [n] row numbers in the input, each once
    token_ids: NDArray[np.int32]  # [offsets[-1]]
    offsets: NDArray[np.int64]  # [n + 1]
    seeds: NDArray[np.uint64]  # [n] random seeds; used only if temperature > 0
    params: tuple[SamplingParams, ...]  # the different ones among all rows
    param_index: NDArray[np.int32]  # [n] into params

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def of(prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int] | None = None) -> "Requests":
        """Make requests from lists of token ids, with rows numbered from 0 and all with the same params."""
        n = len(prompts)
        offsets = offsets_of(np.array([len(p) for p in prompts], np.int64))
        flat = np.fromiter((t for p in prompts for t in p), np.int32, int(offsets[-1]))
        row_seeds = np.zeros(n, np.uint64) if seeds is None else np.array(seeds, np.uint64)
        return Requests(np.arange(n), flat, offsets, row_seeds, (params,), np.zeros(n, np.int32))

    def take(self, index: NDArray[np.int64]) -> "Requests":
        """Return the requests at `index`, in that order."""
        token_ids, offsets = take_ragged(self.token_ids, self.offsets, index)
        return Requests(self.rows[index], token_ids, offsets, self.seeds[index], self.params, self.param_index[index])


@dataclass(frozen=True)
class Completions:
    """n finished rows. Row i's new tokens are `token_ids[offsets[i]:offsets[i + 1]]`, the end-of-text id included."""

    rows: NDArray[np.int64]  # [n]
    token_ids: NDArray[np.int32]  # [offsets[-1]]
    offsets: NDArray[np.int64]  # [n + 1]
    finish_reasons: NDArray[np.int8]  # [n] FinishReason
    errors: dict[int, RowError] = field(default_factory=dict)  # by row number, for rows that ended with ERROR

    @staticmethod
    def none() -> "Completions":
        """No rows."""
        return Completions(np.empty(0, np.int64), np.empty(0, np.int32), np.zeros(1, np.int64), np.empty(0, np.int8))

    def __len__(self) -> int:
        return len(self.rows)

    def tokens_of(self, i: int) -> list[int]:
        """Return the new tokens of the i-th completion."""
        tokens: list[int] = self.token_ids[self.offsets[i] : self.offsets[i + 1]].tolist()
        return tokens

    def given_to(self, rows: NDArray[np.int64], index: NDArray[np.int64]) -> "Completions":
        """Return copies of the completions at `index` [m], as completions of other rows: `rows` [m]."""
        token_ids, offsets = take_ragged(self.token_ids, self.offsets, index)
        reasons = self.finish_reasons[index]
        failed = np.flatnonzero(reasons == FinishReason.ERROR)
        sources = self.rows[index[failed]].tolist()
        errors = {row: self.errors[source] for row, source in zip(rows[failed].tolist(), sources, strict=True)}
        return Completions(rows, token_ids, offsets, reasons, errors)
