"""Choosing tokens from logits: greedy, or by Gumbel's trick with noise keyed by (row seed, position, token id).

`argmax(logits / temperature + Gumbel noise)` is a draw from the softmax. Because the noise is keyed, the draw depends
on the row alone: not on the batch, the order of rows, or how many drafts were verified at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

CANDIDATES = 256
"""Number of most likely tokens among which the filters look first, because they usually leave few tokens. The whole
vocabulary is sorted only for rows where more tokens pass. Which way a row takes depends on the row alone."""


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling parameters of r rows of logits; `SamplingParams` says what they mean."""

    temperature: Tensor  # [r] float32, 0 is greedy
    top_k: Tensor  # [r] int64, 0 is off
    top_p: Tensor  # [r] float32, 1 is off
    min_p: Tensor  # [r] float32, 0 is off
    seeds: Tensor  # [r] int64, the bits of the row seeds
    positions: Tensor  # [r] int64, position of the token to be chosen

    def of(self, rows: Tensor) -> "SamplingBatch":
        """Return the parameters of the rows `rows`, int64 [n]."""
        columns = (self.temperature, self.top_k, self.top_p, self.min_p, self.seeds, self.positions)
        return SamplingBatch(*(column[rows] for column in columns))


def greedy(logits_rV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most likely tokens: (token ids int64 [r], finite bool [r]).

    `finite` is False for a row whose maximum is NaN or infinite; its token id means nothing.
    """
    most, tokens = logits_rV.max(-1)
    return tokens, most.isfinite()


def sample(logits_rV: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Draw a token from each row of float32 logits: (token ids int64 [r], finite bool [r]).

    The filters apply to the distribution at the row's temperature: top-k first, then top-p to what top-k leaves
    (Holtzman et al. 2020), then min-p relative to the most likely token. Tokens that tie at a filter's threshold all
    stay. `finite` is as in `greedy`.
    """
    tokens, finite = greedy(logits_rV)
    filtered = (batch.top_k > 0) | (batch.top_p < 1) | (batch.min_p > 0)
    if len(rows := ((batch.temperature > 0) & ~filtered).nonzero().flatten()):
        noise = gumbel(batch.seeds[rows], batch.positions[rows], logits_rV.shape[1])
        tokens[rows] = (_tempered(logits_rV, batch, rows).double() + noise).argmax(-1)
    rows = ((batch.temperature > 0) & filtered).nonzero().flatten()
    for count in (min(CANDIDATES, logits_rV.shape[1]), logits_rV.shape[1]):
        if len(rows):
            tokens[rows], settled = _draw(_tempered(logits_rV, batch, rows), batch.of(rows), count)
            rows = rows[~settled]
    return tokens, finite


def _tempered(logits_rV: Tensor, batch: SamplingBatch, rows: Tensor) -> Tensor:
    return logits_rV[rows] / batch.temperature[rows, None]


def _draw(logits_rV: Tensor, batch: SamplingBatch, count: int) -> tuple[Tensor, Tensor]:
    """Draw from the `count` most likely tokens: (token ids [r], settled [r]).

    A row is settled, and its token valid, if no token outside these passes the filters.
    """
    ordered, ids = logits_rV.topk(count, dim=-1)
    probabilities = logits_rV.softmax(-1).gather(-1, ids).double()
    beyond = (torch.arange(count) >= batch.top_k[:, None]) & (batch.top_k > 0)[:, None]
    probabilities.masked_fill_(beyond, 0.0)
    whole = torch.where(batch.top_k > 0, probabilities.sum(-1), 1.0)[:, None]
    before = probabilities.cumsum(-1) - probabilities
    inside = ((before < batch.top_p.double()[:, None] * whole) | (batch.top_p >= 1)[:, None]) & ~beyond
    # The condition p >= min_p * p_max, in logits. log(0) is -inf, which excludes nothing.
    floor = torch.maximum(
        ordered.masked_fill(~inside, float("inf")).amin(-1, keepdim=True), ordered[:, :1] + batch.min_p.log()[:, None]
    )
    kept = ordered >= floor
    # top-p needs the mass of all tokens that top-k leaves.
    settled = ~kept[:, -1] & (batch.top_k <= count) if count < logits_rV.shape[1] else torch.ones_like(kept[:, -1])
    most = int((kept & settled[:, None]).sum(-1).amax().clamp(min=1))
    noise = gumbel_of(batch.seeds, batch.positions, ids[:, :most])
    scores = (ordered[:, :most].double() + noise).masked_fill_(~kept[:, :most], float("-inf"))
    return ids.gather(-1, scores.argmax(-1, keepdim=True)).squeeze(-1), settled


def gumbel(seeds_r: Tensor, positions_r: Tensor, vocab: int) -> Tensor:
    """Return standard Gumbel noise, float64 [r, vocab], a pure function of (seed, position, token id)."""
    words = philox(torch.arange((vocab + 3) // 4), positions_r[:, None], seeds_r[:, None])
    return _gumbel(torch.stack(words, -1).flatten(1)[:, :vocab])  # token id = 4 * counter + word


def gumbel_of(seeds_r: Tensor, positions_r: Tensor, ids_rn: Tensor) -> Tensor:
    """Return the noise of `gumbel` for n token ids of each row, float64 [r, n]."""
    words = torch.stack(philox(ids_rn // 4, positions_r[:, None], seeds_r[:, None]), -1)
    return _gumbel(words.gather(-1, (ids_rn % 4)[..., None]).squeeze(-1))


def _gumbel(words: Tensor) -> Tensor:
    uniform = (words.double() + 0.5) / 2.0**32
    return -torch.log(-torch.log(uniform))


def philox(counter: Tensor, position: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four words of 32 random bits by Philox 4x32-10 (Salmon et al. 2011), as int64 tensors.

    Philox's counter is (counter, position, 0, 0) and its key the 64 bits of `seed`. The arguments are int64 tensors
    that broadcast.
    """
    c0, c1 = counter & _MASK, position & _MASK
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # A product of two 32-bit numbers may overflow int64's sign, but all its 64 bits are kept.
        p0, p1 = c0 * _PHILOX_M0, c2 * _PHILOX_M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _PHILOX_W0) & _MASK, (k1 + _PHILOX_W1) & _MASK
    return c0, c1, c2, c3
