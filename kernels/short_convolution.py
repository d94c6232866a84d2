"""A causal convolution over the last few positions, each channel by itself.

A token's sum has the same terms in the same order in a tile and alone, so its bits do not depend on what is computed
with it.
"""

import torch
from torch import Tensor

from batchinfer.kernels.state_pool import StateBatch, StateTiles


def convolve(
    x_TC: Tensor, inputs_SLC: Tensor, batch: StateBatch, taps_KC: Tensor, bias_C: Tensor | None = None
) -> Tensor:
    """Return the convolution of x [T, C], in its type; rows of padding are zero.

    `taps` are float32, the last one for a token itself. `inputs` is the pool of the states, the L = K - 1 inputs before
    a token; it is updated. The sum is computed in float32.
    """
    out = torch.zeros_like(x_TC)
    for part in batch:
        if isinstance(part, StateTiles):
            seen = torch.cat([inputs_SLC[part.before], x_TC[part.rows]], 1)
            out[part.rows[part.real]] = _weighted(seen, taps_KC, bias_C)[part.real].to(out.dtype)
            ends = part.real.sum(1, keepdim=True) + torch.arange(inputs_SLC.shape[1])
            part.leave(inputs_SLC, seen.gather(1, ends[..., None].expand(-1, -1, seen.shape[2])))
        else:
            seen = torch.cat([inputs_SLC[part.before], x_TC[part.rows][:, None]], 1)
            out[part.rows] = _weighted(seen, taps_KC, bias_C)[:, 0].to(out.dtype)
            inputs_SLC[part.after] = seen[:, 1:]
    return out


def _weighted(seen_nMC: Tensor, taps_KC: Tensor, bias_C: Tensor | None) -> Tensor:
    """Return the sums [n, M - K + 1, C] of all windows of K positions."""
    count = seen_nMC.shape[1] - len(taps_KC) + 1
    total = torch.zeros(1) if bias_C is None else bias_C
    for k, tap in enumerate(taps_KC):
        total = total + seen_nMC[:, k : k + count].float() * tap
    return total
