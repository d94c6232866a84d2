"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024): for prompts in tiles, for other tokens one at a time.

With a token's key k and value v, its rate b and its decay a, the state S [key_dim, value_dim] of a head becomes
`a S + k (b (v - a S^T k))^T`: a share b of the value that S holds for k is replaced. The token's output is `S^T q`.

In a tile the values that are written depend on each other, each on those before it. They are the solution of a
triangular system, and all else is matrix products (Yang et al. 2024). Every product has a shape that follows from the
tile alone, so that the bits do not depend on what else is computed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.kernels.attention import batched_product
from batchinfer.kernels.grain import TILE
from batchinfer.kernels.state_pool import StateBatch, StateTiles

_CACHED = 1 << 18
"""Numbers of states that are updated together: 1 MB, so that they are read from memory once and written once."""


@dataclass(frozen=True)
class DeltaTokens:
    """What the rule takes of T tokens, float32. Each head of queries and keys serves neighbouring heads of values."""

    query: Tensor  # [T, key_heads, key_dim]
    key: Tensor  # [T, key_heads, key_dim]
    value: Tensor  # [T, heads, value_dim]
    rate: Tensor  # [T, heads], from 0 to 1
    decay: Tensor  # [T, heads], the logarithm of the state's factor

    def at(self, rows: Tensor) -> "DeltaTokens":
        """Return the tokens of these rows, in the rows' shape."""
        return DeltaTokens(self.query[rows], self.key[rows], self.value[rows], self.rate[rows], self.decay[rows])

    def real(self, real_nT: Tensor) -> "DeltaTokens":
        """Return tiles of tokens in which those that are not `real` change no state: they write and decay nothing."""
        others = ~real_nT[..., None]
        large = (x.masked_fill(others[..., None], 0.0) for x in (self.query, self.key, self.value))
        return DeltaTokens(*large, *(x.masked_fill(others, 0.0) for x in (self.rate, self.decay)))


def delta_rule(tokens: DeltaTokens, matrices_SHkv: Tensor, batch: StateBatch) -> Tensor:
    """Return the outputs, float32 [T, heads, value_dim]; rows of padding are zero.

    `matrices` is the pool of the states, [states, heads, key_dim, value_dim]; it is updated.
    """
    out = torch.zeros_like(tokens.value)
    for part in batch:
        if isinstance(part, StateTiles):
            mixed, states = _tiles(tokens.at(part.rows).real(part.real), matrices_SHkv[part.before])
            out[part.rows[part.real]] = mixed[part.real]
            part.leave(matrices_SHkv, states)
        else:
            for few in part.split(_pieces(matrices_SHkv)):
                out[few.rows], matrices_SHkv[few.after] = _one_each(tokens.at(few.rows), matrices_SHkv[few.before])
    return out


def _pieces(matrices_SHkv: Tensor) -> int:
    """Return of how many sequences the states stay in the cache between the operations on them."""
    return max(1, _CACHED // matrices_SHkv[0].numel())


def _tiles(tokens: DeltaTokens, state_nHkv: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs of n tiles [n, TILE, heads, value_dim], and the states behind them."""
    heads = state_nHkv.shape[1]
    query, key = (_by_head(x, heads) for x in (tokens.query, tokens.key))
    value, rate = tokens.value.transpose(1, 2), tokens.rate.transpose(1, 2)[..., None]
    past = tokens.decay.transpose(1, 2).cumsum(-1)  # [n, heads, TILE], the logarithm of the decay since the tile began
    seen = torch.ones(TILE, TILE, dtype=torch.bool).tril()
    between = (past[..., :, None] - past[..., None, :]).masked_fill(~seen, float("-inf")).exp()
    decayed = past.exp()[..., None]
    left = past[..., -1:]

    # Token i writes `written[i] = rate (value - what the state and the tokens before i have put at its key)`.
    system = _product(key, key.transpose(2, 3)) * between * rate
    missing = (value - _product(key * decayed, state_nHkv)) * rate
    written = torch.linalg.solve_triangular(system, missing, upper=False, unitriangular=True)
    scores = _product(query, key.transpose(2, 3)) * between
    out = _product(query * decayed, state_nHkv) + _product(scores, written)
    kept = key * (left - past).exp()[..., None]
    state = state_nHkv * left.exp()[..., None] + _product(kept.transpose(2, 3), written)
    return out.transpose(1, 2), state


def _one_each(tokens: DeltaTokens, state_nHkv: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs of one token of each of n sequences [n, heads, value_dim], and the states behind them.

    `state` is overwritten.
    """
    heads = state_nHkv.shape[1]
    query, key = (_by_head(x[:, None], heads)[:, :, 0] for x in (tokens.query, tokens.key))
    decay, rate = tokens.decay.exp()[..., None], tokens.rate[..., None]
    held, read = _product(torch.stack([key, query], 2), state_nHkv).mul_(decay[..., None]).unbind(2)
    written = (tokens.value - held) * rate
    out = read + (key * query).sum(-1, keepdim=True) * written
    return out, state_nHkv.mul_(decay[..., None]).add_(key[..., None] * written[:, :, None])


def _by_head(x_nTKd: Tensor, heads: int) -> Tensor:
    """Return the queries or keys of every head of values, [n, heads, T, d]."""
    return x_nTKd.transpose(1, 2).repeat_interleave(heads // x_nTKd.shape[2], 1)


def _product(left_nHMK: Tensor, right_nHKN: Tensor) -> Tensor:
    """Return the products of n * heads pairs of matrices, [n, heads, M, N]."""
    product = batched_product(left_nHMK.flatten(0, 1), right_nHKN.flatten(0, 1))
    return product.view(*left_nHMK.shape[:2], *product.shape[1:])
