"""Verifying drafts: a draft is accepted if it equals the token that the target model draws at its position.

Sampling is Gumbel's trick with noise keyed by (row seed, position, token id), so what a row draws at a position is
fixed before anything is drafted. Accepting equal tokens couples draft and target without communication (Daliri et al.
2024). The output is, token for token, the same as without speculation: drafts change only the number of steps.
Rejection sampling (Leviathan et al. 2023), in contrast, keeps only the distribution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drafts:
    """The tokens of S sequences in one step: each sequence's newest known token, then 0 or more drafts.

    The token that follows token i of a sequence is drawn at position `lengths + i`. A sequence without tokens (padding)
    or without room gets no new token.
    """

    offsets: Tensor  # [S + 1] int32 or int64; sequence s has the tokens [offsets[s], offsets[s + 1])
    tokens: Tensor  # [T] int64, the step's tokens; those after the last sequence are padding
    lengths: Tensor  # [S] int64, number of known tokens of each sequence
    room: Tensor  # [S] int64, number of new tokens that each sequence may still get
    ignore_eos: Tensor  # [S] bool, whether the sequence goes on after an end-of-text token
    eos_ids: Tensor  # [E] int64, may be empty
    most: int  # the most drafts of a sequence; a plain number, so that the host need not wait for `offsets`


@dataclass(frozen=True)
class Verified:
    """The new tokens of S sequences after a step: the accepted drafts, and one more token of the target model."""

    accepted: Tensor  # [S] int64, number of accepted drafts
    new_tokens: Tensor  # [S, most + 1] int64, accepted + 1 tokens, then -1
    newest: Tensor  # [S] int64, the last new token; 0 if there is none
    new_lengths: Tensor  # [S] int64, number of known tokens after the step
    finite: Tensor  # [S] bool, whether the logits were finite wherever a new token was drawn


def verify(drafts: Drafts, targets_T: Tensor, finite_T: Tensor) -> Verified:
    """Compare drafts with `targets_T`, int64: the token that the target model draws after each token of the step.

    Where `finite_T` (bool) is False, the logits were not finite and the target means nothing. This is reported only
    for tokens that become new tokens: no sequence fails because of logits after a rejected draft.
    """
    start_S1, end_S1 = drafts.offsets[:-1, None], drafts.offsets[1:, None]
    o_k = torch.arange(drafts.most + 1, device=targets_T.device)
    rows_SK = start_S1 + o_k
    inside_SK = (rows_SK < end_S1) & (o_k < drafts.room[:, None])
    rows_SK = rows_SK.where(inside_SK, 0)
    # A draft counts if the token before it counts, the target model drew the same token at its position, and that token
    # does not end the text.
    before_SK = targets_T[(rows_SK - 1).clamp(min=0)]
    ended_SK = torch.isin(before_SK, drafts.eos_ids) & ~drafts.ignore_eos[:, None]
    follows_SK = (o_k == 0) | ((before_SK == drafts.tokens[rows_SK]) & ~ended_SK)
    counts_SK = (inside_SK & follows_SK).cumprod(-1).bool()
    new_S = counts_SK.sum(-1)

    targets_SK = targets_T[rows_SK]
    return Verified(
        accepted=(new_S - 1).clamp(min=0),
        new_tokens=targets_SK.where(counts_SK, -1),
        newest=targets_SK.where(o_k == new_S[:, None] - 1, 0).sum(-1),
        new_lengths=drafts.lengths + new_S,
        finite=(finite_T[rows_SK] | ~counts_SK).all(-1),
    )
