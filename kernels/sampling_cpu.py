"""Choosing tokens from logits by the kernel in C (`sampling_cpu.c`); rows with filters end in the reference's way."""

import ctypes

import torch
from torch import Tensor

from batchinfer.kernels.cpu_library import Arguments, address, integers, pointers
from batchinfer.kernels.sampling import SamplingBatch, draw_filtered, filtered_rows


class _Sampling(Arguments):
    _fields_ = (*pointers("logits temperature seeds positions tokens finite"), *integers("rows vocabulary"))


def sample(library: ctypes.CDLL, logits_rV: Tensor, batch: SamplingBatch | None) -> tuple[Tensor, Tensor]:
    """Return (token ids int64 [r], finite bool [r]) of float32 logits, as `Backend.sample` says.

    The noise is the reference's, rounded to float32: where two tokens' scores differ by less than that, another one may
    be drawn than there.
    """
    logits, rows = logits_rV.contiguous(), len(logits_rV)
    tokens, finite = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.bool)
    filtered = torch.zeros(rows, dtype=torch.bool) if batch is None else filtered_rows(batch)
    if batch is None:
        temperature, seeds, positions = torch.zeros(rows), tokens, tokens
    else:
        temperature = batch.temperature.masked_fill(filtered, 0.0)
        seeds, positions = batch.seeds.contiguous(), batch.positions.contiguous()
    operands = (logits, temperature, seeds, positions, tokens, finite)
    library.sample(ctypes.byref(_Sampling(*map(address, operands), *logits.shape)))
    if batch is not None and filtered.any():
        draw_filtered(tokens, logits, batch, filtered)
    return tokens, finite
