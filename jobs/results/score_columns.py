"""The result columns of log-probabilities: those of an answer's or a prompt's tokens, and those of a scored text."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchinfer.engine.request import TokenScores
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.jobs.score_flags import ScoreFlags
from batchinfer.kernels.ragged import offsets_of

LOGPROBS, PROMPT_LOGPROBS, OF_TEXT = "logprobs", "prompt_logprobs", "token_log_probabilities"
TOKEN = [pa.field("token", pa.string()), pa.field("token_id", pa.int32()), pa.field("logprob", pa.float32())]
FIGURES = [
    pa.field("log_probability", pa.float64()),
    pa.field("log_probability_per_token", pa.float64()),
    pa.field("log_probability_per_byte", pa.float64()),
    pa.field("greedy", pa.bool_()),
]
PERPLEXITY = pa.field("perplexity", pa.float64())

TextsOf = Callable[[NDArray[np.int32]], Sequence[str]]
"""Returns the texts of tokens [m]."""


def answer_score_fields(likeliest: int) -> list[pa.Field]:
    """Return the columns that each answer has, if there may be so many likeliest tokens beside each of its tokens: a
    list with an entry for each token. There are none at -1."""
    return [] if likeliest < 0 else [pa.field(LOGPROBS, _listed(likeliest))]


def prompt_score_fields(sampling: SamplingParams) -> list[pa.Field]:
    """Return the columns of a row's prompt: a list with an entry for each of its tokens but the first."""
    return [] if sampling.prompt_logprobs < 0 else [pa.field(PROMPT_LOGPROBS, _listed(sampling.prompt_logprobs))]


def text_score_fields(flags: ScoreFlags) -> list[pa.Field]:
    """Return the columns of rows whose texts are scored."""
    if not flags.scores_texts:
        return []
    perplexity = [] if flags.text_column is None else [PERPLEXITY]
    tokens = [pa.field(OF_TEXT, _listed(0))] if flags.token_log_probabilities else []
    return [*FIGURES, *perplexity, *tokens]


def _listed(likeliest: int) -> pa.ListType:
    top = [pa.field("top", pa.list_(pa.struct(TOKEN)))] if likeliest else []
    return pa.list_(pa.struct([*TOKEN, *top]))


def token_score_column(
    kind: pa.ListType, scores: TokenScores, failed: NDArray[np.bool_], texts_of: TextsOf
) -> pa.ListArray:
    """Return the lists [n] of this type; null for a row that failed [n] or has no log-probabilities."""
    columns = _columns(scores.token_ids, scores.values, texts_of)
    if len(kind.value_type) > len(TOKEN):
        asked = scores.top_ids >= 0
        tops = _columns(scores.top_ids[asked], scores.top_values[asked], texts_of)
        bounds = pa.array(offsets_of(asked.sum(1)), pa.int32())
        columns.append(pa.ListArray.from_arrays(bounds, pa.StructArray.from_arrays(tops, fields=TOKEN)))
    entries = pa.StructArray.from_arrays(columns, fields=list(kind.value_type))
    without = failed | (np.diff(scores.offsets) == 0)
    return pa.ListArray.from_arrays(pa.array(scores.offsets, pa.int32()), entries, kind, mask=pa.array(without))


def _columns(ids: NDArray[np.int32], values: NDArray[np.float32], texts_of: TextsOf) -> list[pa.Array]:
    # A token that the model rules out has the log-probability -inf, which JSON does not know.
    return [pa.array(texts_of(ids), pa.string()), pa.array(ids), pa.array(values, mask=~np.isfinite(values))]


def text_score_columns(
    fields: Sequence[pa.Field],
    scores: TokenScores,
    nbytes: NDArray[np.int64],
    failed: NDArray[np.bool_],
    texts_of: TextsOf,
) -> list[pa.Array]:
    """Return the columns `fields` of n rows whose texts are of so many bytes [n]; null for a row that failed [n]."""
    counts = np.maximum(np.diff(scores.offsets), 1)
    row = np.repeat(np.arange(len(nbytes)), np.diff(scores.offsets))
    sums = np.bincount(row, scores.values.astype(np.float64), len(nbytes))
    unlikely = scores.values < scores.top_values[:, 0]  # a token that ties with the likeliest one is as likely
    with np.errstate(over="ignore"):
        found: dict[str, NDArray[Any]] = {
            "log_probability": sums,
            "log_probability_per_token": sums / counts,
            "log_probability_per_byte": sums / np.maximum(nbytes, 1),
            "greedy": np.bincount(row[unlikely], minlength=len(nbytes)) == 0,
            PERPLEXITY.name: np.exp(-sums / counts),
        }
    masks = {name: failed | ~np.isfinite(values) for name, values in found.items()}
    return [
        token_score_column(field.type, scores, failed, texts_of)
        if field.name == OF_TEXT
        else pa.array(found[field.name], field.type, mask=masks[field.name])
        for field in fields
    ]
