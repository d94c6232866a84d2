"""Log-probabilities of given tokens, beside those that are sampled."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoredTokens:
    """The m tokens whose log-probabilities are wanted."""

    rows: Tensor  # [m] int64, the row of logits that predicts each
    tokens: Tensor  # [m] int64, token ids


def log_probabilities(logits_sV: Tensor, scored: ScoredTokens) -> Tensor:
    """Return the log-probability of each scored token, float32 [m], from float32 logits.

    Each comes from its own row alone, so that its bits do not depend on the rows beside it.
    """
    return logits_sV[scored.rows, scored.tokens] - torch.logsumexp(logits_sV, -1)[scored.rows]
