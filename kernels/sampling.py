"""Choosing tokens from logits: greedy, or by Gumbel's trick with noise keyed by (row seed, position, token id).

`argmax(logits / temperature + Gumbel noise)` is a draw from the softmax. Keyed noise makes the draw a function of the
row alone: not of the batch, the order, or how many tokens were proposed at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class SamplingBatch:
    """Parameters of r rows of logits, one each; `SamplingParams` says what they mean."""

    temperature: Tensor  # [r] float32, 0 is greedy
    top_k: Tensor  # [r] int64, 0 is off
    top_p: Tensor  # [r] float32, 1 is off
    min_p: Tensor  # [r] float32, 0 is off
    seeds: Tensor  # [r] int64, the bits of the row seeds
    positions: Tensor  # [r] int64, of the token to be chosen


def greedy(logits_rV: Tensor) -> tuple[Tensor, Tensor]:
    """(token ids int64 [r], finite bool [r]): a row with a NaN or infinite maximum is flagged, its id means nothing."""
    most, tokens = logits_rV.max(-1)
    return tokens, most.isfinite()


def sample(logits_rV: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """(token ids int64 [r], finite bool [r]) by temperature, then top-k, top-p and min-p, of float32 logits.

    The three filters apply to the tempered distribution: top-k first, top-p to what it leaves (Holtzman et al. 2020),
    min-p relative to the most likely token. Ties at a filter's border all stay.
    """
    tokens, finite = greedy(logits_rV)
    drawn = (batch.temperature > 0).nonzero().flatten()
    if len(drawn):
        tempered = logits_rV[drawn] / batch.temperature[drawn, None]
        kept = _filter(tempered, batch.top_k[drawn], batch.top_p[drawn], batch.min_p[drawn])
        noise = gumbel(batch.seeds[drawn], batch.positions[drawn], logits_rV.shape[1])
        tokens[drawn] = (kept.double() + noise).argmax(-1)
    return tokens, finite


def _filter(logits_rV: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Logits with -inf where a filter excludes the token."""
    floor = torch.full_like(logits_rV[:, :1], float("-inf"))
    if bool((min_p > 0).any()):
        # p >= min_p * p_max, in logits; log(0) is -inf, which excludes nothing.
        floor = torch.maximum(floor, logits_rV.amax(-1, keepdim=True) + min_p.log()[:, None])
    if bool((top_k > 0).any() or (top_p < 1).any()):
        ordered = logits_rV.sort(-1, descending=True).values
        rank = torch.arange(ordered.shape[1])
        ordered.masked_fill_((rank >= top_k[:, None]) & (top_k > 0)[:, None], float("-inf"))
        probabilities = ordered.double().softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        inside = (before < top_p.double()[:, None]) & ordered.isfinite()
        smallest = ordered.masked_fill(~inside, float("inf")).amin(-1, keepdim=True)
        floor = torch.maximum(floor, smallest)
    return logits_rV.masked_fill(logits_rV < floor, float("-inf"))


def gumbel(seeds_r: Tensor, positions_r: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise float64 [r, vocab], a pure function of (seed, position, token id)."""
    counters = torch.arange((vocab + 3) // 4)
    words = philox(counters, positions_r[:, None], seeds_r[:, None])
    word = torch.stack(words, -1).flatten(1)[:, :vocab]  # token id = 4 * counter + word
    uniform = (word.double() + 0.5) / 2.0**32
    return -torch.log(-torch.log(uniform))


def philox(counter: Tensor, position: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 (Salmon et al. 2011) of counter (counter, position, 0, 0) and key = the 64 bits of seed.

    int64 tensors that broadcast; four int64 tensors of 32 random bits each.
    """
    c0, c1 = counter & _MASK, position & _MASK
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # Products of 32 by 32 bits wrap in int64, which keeps their 64 bits.
        p0, p1 = c0 * _PHILOX_M0, c2 * _PHILOX_M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _PHILOX_W0) & _MASK, (k1 + _PHILOX_W1) & _MASK
    return c0, c1, c2, c3
