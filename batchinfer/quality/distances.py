"""Measures of quality from logits: likelihood, and divergence from a reference model."""

import torch
from torch import Tensor


def log_likelihoods(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Return the natural logarithm of each target's probability, float32 [T]."""
    return logits_TV.float().log_softmax(-1).gather(-1, targets_T[:, None]).squeeze(-1)


def divergences(reference_TV: Tensor, logits_TV: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of each row from the reference, in nats, float32 [T]."""
    expected, found = reference_TV.float().log_softmax(-1), logits_TV.float().log_softmax(-1)
    return torch.nn.functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1)
