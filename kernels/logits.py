"""Changing logits before tokens are chosen from them: penalties, bans, tokens that must come, and what grammars allow.

Penalties and bans touch only the logits concerned, by torch's operations on every device: they are a small part of what
a step reads of its logits anyway. A grammar has a bit for each token. Each logit is changed by itself, so that a row's
bits do not depend on the rows beside it.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

NEVER = float("-inf")


@dataclass(frozen=True)
class LogitsChanges:
    """What changes in a step's logits [r, V]: n penalized ones, each named once, and b banned ones; in f rows, all but
    one are banned.

    A positive logit is divided by its factor and another one multiplied; then `subtracted` is subtracted.
    """

    rows: Tensor  # [n] int64
    ids: Tensor  # [n] int64, token ids
    factors: Tensor  # [n] float32, 1 is off
    subtracted: Tensor  # [n] float32, 0 is off
    banned_rows: Tensor  # [b] int64
    banned_ids: Tensor  # [b] int64
    forced_rows: Tensor  # [f] int64, each once
    forced_ids: Tensor  # [f] int64

    def within(self, vocabulary: int) -> "LogitsChanges":
        """Leave out the token ids that a model with this vocabulary lacks."""
        known, banned = self.ids < vocabulary, self.banned_ids < vocabulary
        if known.all() and banned.all():
            return self
        columns = {name: getattr(self, name)[known] for name in ("rows", "ids", "factors", "subtracted")}
        return replace(self, **columns, banned_rows=self.banned_rows[banned], banned_ids=self.banned_ids[banned])


def change_logits(logits_rV: Tensor, changes: LogitsChanges) -> None:
    """Change float32 logits in place. Those that are not finite stay so, and a banned infinity becomes NaN."""
    at = changes.rows, changes.ids
    old = logits_rV[at]
    logits_rV[at] = torch.where(old < 0, old * changes.factors, old / changes.factors) - changes.subtracted
    logits_rV[changes.banned_rows, changes.banned_ids] += NEVER
    if len(changes.forced_rows):
        forced = changes.forced_rows, changes.forced_ids
        kept = logits_rV[forced]
        logits_rV[changes.forced_rows] += NEVER
        logits_rV[forced] = kept


def allow_tokens(logits_rV: Tensor, bits_rW: Tensor) -> None:
    """Ban, in place, the tokens whose bit is not set in `bits_rW`, int32 [r, V / 32]; the lowest bit comes first."""
    unpacked = np.unpackbits(bits_rW.numpy().view(np.uint8), axis=1, count=logits_rV.shape[1], bitorder="little")
    logits_rV.masked_fill_(torch.from_numpy(unpacked) == 0, NEVER)
