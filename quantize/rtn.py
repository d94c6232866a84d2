"""Round to nearest: the plain quantization of weights."""

import torch
from torch import Tensor


def quantize_channels(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """8 bits per output channel, symmetric: (int8 [N, K], scale float32 [N]) with weight about int8 * scale."""
    weight = weight_NK.to(torch.float32, copy=True)
    scale = weight.abs().amax(-1).div_(127.0).clamp_(min=1e-30)
    return weight.div_(scale[:, None]).round_().to(torch.int8), scale
