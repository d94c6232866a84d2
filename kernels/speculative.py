"""Verifying draft tokens: one is accepted if it is the very token that the target model draws in its place.

Sampling is Gumbel's trick with noise keyed by (row seed, position, token id), so that what a row draws at a position is
fixed before anybody drafts. Accepting what is equal couples draft and target without communication (Daliri et al.
2024), and the output is, token for token, that without speculation: drafts change how many steps it takes, never what
comes out. Rejection sampling (Leviathan et al. 2023) keeps the distribution alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drafts:
    """The tokens of S sequences in one step: each one's newest known token, then drafts of those to come, 0 or more.

    What token i of a sequence is followed by is drawn at position `lengths + i`. A sequence without tokens, which pads
    the step, or without room gets no new token.
    """

    offsets: Tensor  # [S + 1] int32 or int64; sequence s has the tokens [offsets[s], offsets[s + 1])
    tokens: Tensor  # [T] int64, the step's; those behind the last sequence are padding
    lengths: Tensor  # [S] int64, known tokens of each sequence
    room: Tensor  # [S] int64, new tokens that each may still have
    ignore_eos: Tensor  # [S] bool, whether it goes on behind an end-of-text token
    eos_ids: Tensor  # [E] int64, may be empty
    most: int  # drafts of a sequence that are looked at; a plain number, so that the host need not wait for `offsets`


@dataclass(frozen=True)
class Verified:
    """What S sequences have gained by a step: the drafts that were right, and one token of the target's own."""

    accepted: Tensor  # [S] int64, drafts that were right, as far as they count
    new_tokens: Tensor  # [S, most + 1] int64, accepted + 1 of them, then -1
    newest: Tensor  # [S] int64, the last new token; 0 if there is none
    new_lengths: Tensor  # [S] int64, known tokens from now on
    finite: Tensor  # [S] bool, whether logits were finite wherever a new token was drawn


def verify(drafts: Drafts, targets_T: Tensor, finite_T: Tensor) -> Verified:
    """Compare drafts with `targets`, int64: what the target model draws behind each token of the step.

    Where `finite` (bool) is False, the logits were of no use and the target means nothing. That matters only at tokens
    that count: no sequence fails because a wrong draft led somewhere odd.
    """
    start_S1, end_S1 = drafts.offsets[:-1, None], drafts.offsets[1:, None]
    o_k = torch.arange(drafts.most + 1, device=targets_T.device)
    rows_SK = start_S1 + o_k
    inside_SK = (rows_SK < end_S1) & (o_k < drafts.room[:, None])
    rows_SK = rows_SK.where(inside_SK, 0)
    # A token counts if the one before it counts, drew this very token, and did not end the text by that.
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
