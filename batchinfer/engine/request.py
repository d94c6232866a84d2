"""`Requests` and `Completions`: the engine's input and output, as columns, without a Python object per row.

Free of torch: the parent process of a job imports this module.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.kernels.ragged import offsets_of, ranges, take_ragged


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
class Choices:
    """The labels that each of n rows chooses from: row i has the labels `rows[i]` to `rows[i + 1]`, one or more.

    Label j's tokens, one or more, are `token_ids[offsets[j]:offsets[j + 1]]`: those behind its row's prompt. Its text,
    which the engine does not read, is `texts[text_offsets[j]:text_offsets[j + 1]]`.
    """

    token_ids: NDArray[np.int32]  # [offsets[-1]]
    offsets: NDArray[np.int64]  # [labels + 1]
    rows: NDArray[np.int64]  # [n + 1]
    texts: NDArray[np.uint8]  # [text_offsets[-1]] UTF-8
    text_offsets: NDArray[np.int64]  # [labels + 1]

    @staticmethod
    def of(rows: Sequence[Sequence[Sequence[int]]], texts: Sequence[Sequence[str]] | None = None) -> "Choices":
        """Make choices from lists of labels, which are lists of token ids; their texts are empty if none are given."""
        labels = [label for row in rows for label in row]
        named = [b"" for _ in labels] if texts is None else [text.encode() for row in texts for text in row]
        return Choices(
            np.fromiter((token for label in labels for token in label), np.int32),
            offsets_of(np.array([len(label) for label in labels], np.int64)),
            offsets_of(np.array([len(row) for row in rows], np.int64)),
            np.frombuffer(b"".join(named), np.uint8),
            offsets_of(np.array([len(text) for text in named], np.int64)),
        )

    def take(self, index: NDArray[np.int64]) -> "Choices":
        """Return the choices of the rows at `index`, in that order."""
        labels, rows = ranges(self.rows[:-1][index], np.diff(self.rows)[index])
        ids, texts = (
            take_ragged(self.token_ids, self.offsets, labels),
            take_ragged(self.texts, self.text_offsets, labels),
        )
        return Choices(*ids, rows, *texts)

    def texts_of(self, i: int) -> list[str]:
        """Return the texts of row i's labels."""
        bounds = self.text_offsets[self.rows[i] : self.rows[i + 1] + 1].tolist()
        return [self.texts[a:b].tobytes().decode() for a, b in pairwise(bounds)]

    @property
    def longest(self) -> NDArray[np.int64]:
        """Tokens of each row's longest label [n]."""
        longest: NDArray[np.int64] = np.maximum.reduceat(np.diff(self.offsets), self.rows[:-1])
        return longest

    def of_row(self, i: int) -> tuple[tuple[int, ...], ...]:
        """Return the labels of row i, each as its token ids."""
        bounds = self.offsets[self.rows[i] : self.rows[i + 1] + 1].tolist()
        return tuple(tuple(self.token_ids[a:b].tolist()) for a, b in pairwise(bounds))


@dataclass(frozen=True)
class Requests:
    """n tokenized rows. Row i's prompt is `token_ids[offsets[i]:offsets[i + 1]]`, never empty.

    With `choices`, nothing is generated: each row's labels get their log-probabilities. With `scored_from`, nothing is
    generated either: each row's tokens from that position on get theirs, and as many likeliest ones as `logprobs` says.
    """

    rows: NDArray[np.int64]  # [n] row numbers in the input, each once
    token_ids: NDArray[np.int32]  # [offsets[-1]]
    offsets: NDArray[np.int64]  # [n + 1]
    seeds: NDArray[np.uint64]  # [n] random seeds; used only if temperature > 0
    params: SamplingTable  # those of all rows
    param_index: NDArray[np.int32]  # [n] into params
    choices: Choices | None = None  # None: every row generates tokens
    samples: NDArray[np.int32] | None = None  # [n] answers wanted of each row; None: one. The engine makes one
    scored_from: NDArray[np.int64] | None = None  # [n], 1 or more and below the prompt's length
    scored_bytes: NDArray[np.int64] | None = None  # [n] size of the scored text, which the engine does not read

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def most_new_tokens(self) -> NDArray[np.int64]:
        """The most tokens that may follow each prompt [n]: `max_tokens`, the longest label, or none."""
        if self.scored_from is not None:
            return np.zeros(len(self), np.int64)
        if self.choices is None:
            return self.number("max_tokens").astype(np.int64)
        return self.choices.longest

    def number(self, name: str) -> NDArray[Any]:
        """Return a numeric field of each row's params [n]."""
        column: NDArray[Any] = self.params.numbers[name][self.param_index]
        return column

    @staticmethod
    def of(prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int] | None = None) -> "Requests":
        """Make requests from lists of token ids, with rows numbered from 0 and all with the same params."""
        n = len(prompts)
        offsets = offsets_of(np.array([len(p) for p in prompts], np.int64))
        flat = np.fromiter((t for p in prompts for t in p), np.int32, int(offsets[-1]))
        requests = Requests.alike(np.arange(n), flat, offsets, params)
        return requests if seeds is None else replace(requests, seeds=np.array(seeds, np.uint64))

    @staticmethod
    def alike(
        rows: NDArray[np.int64], token_ids: NDArray[np.int32], offsets: NDArray[np.int64], params: SamplingParams
    ) -> "Requests":
        """Make requests of these prompts that all have the same params, and seeds 0."""
        n = len(rows)
        index, seeds = np.zeros(n, np.int32), np.zeros(n, np.uint64)
        return Requests(rows, token_ids, offsets, seeds, SamplingTable.of([params]), index)

    def take(self, index: NDArray[np.int64]) -> "Requests":
        """Return the requests at `index`, in that order."""
        token_ids, offsets = take_ragged(self.token_ids, self.offsets, index)
        choices = None if self.choices is None else self.choices.take(index)
        samples = None if self.samples is None else self.samples[index]
        seeds, param_index = self.seeds[index], self.param_index[index]
        first, size = (None if each is None else each[index] for each in (self.scored_from, self.scored_bytes))
        return Requests(
            self.rows[index], token_ids, offsets, seeds, self.params, param_index, choices, samples, first, size
        )

    @property
    def scores_prompts(self) -> bool:
        """True if tokens of any prompt get log-probabilities."""
        return self.scored_from is not None or bool((self.number("prompt_logprobs") >= 0).any())

    def prompt_scores(self, i: int) -> tuple[int, int]:
        """Return which tokens of row i's prompt get log-probabilities, and how many likeliest tokens are wanted beside
        each: (position of the first, the prompt's length if none does; number, at least 0)."""
        numbers = self.params.numbers[self.param_index[i]]
        if self.scored_from is not None:
            return int(self.scored_from[i]), max(int(numbers["logprobs"]), 0)
        count, length = int(numbers["prompt_logprobs"]), int(self.offsets[i + 1] - self.offsets[i])
        return 1 if count >= 0 else length, max(count, 0)


def params_of_all(slices: Sequence[Requests]) -> tuple[SamplingTable, NDArray[np.int32]]:
    """Return the params of one slice of rows or more, without repetitions, and where those of each row are [rows]."""
    params, places = SamplingTable.joined([requests.params for requests in slices]).different()
    firsts = offsets_of(np.array([len(requests.params) for requests in slices], np.int64)).tolist()
    index = [first + requests.param_index for first, requests in zip(firsts, slices, strict=False)]
    return params, places[np.concatenate(index)]


@dataclass(frozen=True)
class Scores:
    """Numbers of n rows: row i's are `values[offsets[i]:offsets[i + 1]]`."""

    values: NDArray[np.float32]  # [offsets[-1]]
    offsets: NDArray[np.int64]  # [n + 1]

    @staticmethod
    def of(rows: Sequence[NDArray[np.float32]]) -> "Scores":
        """Join the numbers of rows, [any] each."""
        return Scores(np.concatenate([NO_SCORES, *rows]), offsets_of(np.array([len(row) for row in rows], np.int64)))

    def take(self, index: NDArray[np.int64]) -> "Scores":
        """Return the numbers of the rows at `index`, in that order."""
        return Scores(*take_ragged(self.values, self.offsets, index))


NO_SCORES = np.empty(0, np.float32)


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of tokens of n rows: row i has those from `offsets[i]` to `offsets[i + 1]`.

    Beside each token stand the k likeliest ones in its place, the likeliest first; where a row asked for fewer, the
    others have the id -1.
    """

    token_ids: NDArray[np.int32]  # [offsets[-1]]
    values: NDArray[np.float32]  # [offsets[-1]]
    top_ids: NDArray[np.int32]  # [offsets[-1], k]
    top_values: NDArray[np.float32]  # [offsets[-1], k]
    offsets: NDArray[np.int64]  # [n + 1]

    @staticmethod
    def none() -> "TokenScores":
        """One row without tokens."""
        ids, values = np.empty((0, 0), np.int32), np.empty((0, 0), np.float32)
        return TokenScores(ids.ravel(), values.ravel(), ids, values, np.zeros(2, np.int64))

    @staticmethod
    def of(parts: Sequence["TokenScores"]) -> "TokenScores":
        """Join the rows of all parts, of one part or more."""
        most = max(part.top_ids.shape[1] for part in parts)
        wider = [(0, 0), (0, most)]
        return TokenScores(
            np.concatenate([part.token_ids for part in parts]),
            np.concatenate([part.values for part in parts]),
            np.concatenate([np.pad(part.top_ids, wider, constant_values=-1)[:, :most] for part in parts]),
            np.concatenate([np.pad(part.top_values, wider)[:, :most] for part in parts]),
            offsets_of(np.concatenate([np.diff(part.offsets) for part in parts])),
        )

    def take(self, index: NDArray[np.int64]) -> "TokenScores":
        """Return the rows at `index`, in that order."""
        at, offsets = ranges(self.offsets[:-1][index], np.diff(self.offsets)[index])
        return TokenScores(self.token_ids[at], self.values[at], self.top_ids[at], self.top_values[at], offsets)


@dataclass(frozen=True)
class Completions:
    """n finished rows. Row i's new tokens are `token_ids[offsets[i]:offsets[i + 1]]`, the end-of-text id included.

    A row with several samples is there once for each, in succession. A row with choices has the tokens of its likeliest
    label, and a score for each label: the log-probability that the model answers with the label's tokens and then ends.
    A row that generates nothing, since its own tokens are scored, has these as its new tokens. A row that failed has no
    scores.
    """

    rows: NDArray[np.int64]  # [n]
    token_ids: NDArray[np.int32]  # [offsets[-1]]
    offsets: NDArray[np.int64]  # [n + 1]
    finish_reasons: NDArray[np.int8]  # [n] FinishReason
    errors: dict[int, RowError] = field(default_factory=dict)  # by row number, for rows that ended with ERROR
    scores: Scores | None = None  # None: no row has any
    logprobs: TokenScores | None = None  # of the new tokens; a row that did not ask for them has none
    prompt_logprobs: TokenScores | None = None  # of the prompt's tokens but the first

    @staticmethod
    def none() -> "Completions":
        """No rows."""
        return Completions(np.empty(0, np.int64), np.empty(0, np.int32), np.zeros(1, np.int64), np.empty(0, np.int8))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def firsts(self) -> NDArray[np.int64]:
        """Return the index of each row's first sample [rows]."""
        return np.flatnonzero(np.diff(self.rows, prepend=-1))

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
        return Completions(
            rows,
            token_ids,
            offsets,
            reasons,
            errors,
            self.scores and self.scores.take(index),
            self.logprobs and self.logprobs.take(index),
            self.prompt_logprobs and self.prompt_logprobs.take(index),
        )
