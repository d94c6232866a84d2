"""Log-probabilities of tokens: of given ones, of those that are sampled, and of the likeliest.

All of them are those of the model's own logits, before anything changes these.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoredTokens:
    """The m tokens whose log-probabilities are wanted."""

    rows: Tensor  # [m] int64, the row of logits that predicts each
    tokens: Tensor  # [m] int64, token ids


@dataclass(frozen=True)
class LogProbabilities:
    """The log-probabilities of m tokens, and the k likeliest tokens of s rows of logits, the likeliest first."""

    values: Tensor  # [m] float32
    top_ids: Tensor  # [s, k] int32
    top_values: Tensor  # [s, k] float32


@dataclass(frozen=True)
class StepScores:
    """All log-probabilities that a step finds; None where it has none of a kind."""

    labels: Tensor | None = None  # [m] float32, of the targets of rows that choose from labels
    sampled: LogProbabilities | None = None  # of sampled tokens
    known: LogProbabilities | None = None  # of tokens of prompts


def log_probabilities(logits_sV: Tensor, scored: ScoredTokens) -> Tensor:
    """Return the log-probability of each scored token, float32 [m], from float32 logits.

    Each comes from its own row alone, so that its bits do not depend on the rows beside it.
    """
    return logits_sV[scored.rows, scored.tokens] - torch.logsumexp(logits_sV, -1)[scored.rows]


def with_likeliest(logits_sV: Tensor, scored: ScoredTokens, count: int) -> LogProbabilities:
    """Return the log-probability of each scored token, and the `count` likeliest tokens of each row of float32 logits.

    Of these, tokens that are equally likely come in the order of their ids.
    """
    total = torch.logsumexp(logits_sV, -1)
    values, ids = logits_sV.topk(count, -1)
    by_id = ids.argsort(-1)
    values, order = values.gather(-1, by_id).sort(stable=True, dim=-1, descending=True)
    ids = ids.gather(-1, by_id).gather(-1, order)
    found = logits_sV[scored.rows, scored.tokens] - total[scored.rows]
    return LogProbabilities(found, ids.int(), values - total[:, None])
