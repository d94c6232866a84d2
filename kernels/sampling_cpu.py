"""Choosing tokens from logits by the kernel in C (`sampling_cpu.c`)."""

import ctypes

import torch
from torch import Tensor

from batchinfer.kernels.cpu_library import Arguments, address, integers, pointers
from batchinfer.kernels.sampling import SamplingBatch


class _Sampling(Arguments):
    _fields_ = (
        *pointers("logits temperature top_k top_p min_p seeds positions tokens finite"),
        *integers("rows vocabulary"),
    )


def sample(library: ctypes.CDLL, logits_rV: Tensor, batch: SamplingBatch | None) -> tuple[Tensor, Tensor]:
    """Return (token ids int64 [r], finite bool [r]) of float32 logits, as `Backend.sample` says.

    Filters and noise are the reference's. Noise and scores are rounded to float32, the masses of top-p are sums in
    float64 of weights in float32, relative to the likeliest token's, and the logarithm of min-p is one of float32:
    where two tokens' scores, or a token and a filter's border, differ by less than that, another token may be drawn
    than there.
    """
    logits, rows = logits_rV.contiguous(), len(logits_rV)
    tokens, finite = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.bool)
    if batch is None:
        parameters = [torch.zeros(rows), *[None] * 5]
    else:
        columns = (batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seeds, batch.positions)
        parameters = [column.contiguous() for column in columns]
    library.sample(ctypes.byref(_Sampling(*map(address, (logits, *parameters, tokens, finite)), *logits.shape)))
    return tokens, finite
