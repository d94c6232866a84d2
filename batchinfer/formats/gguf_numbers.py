"""Dequantizing GGUF tensors. The layouts are ggml's: blocks of 32 or 256 elements, each with its own scales.

- Q8_0: fp16 d, then 32 int8. w = d * q.
- Q4_0: fp16 d, then 16 bytes; their low nibbles are elements 0 to 15, their high nibbles 16 to 31. w = d * (q - 8).
- Q4_K: fp16 d and dmin, 12 bytes with eight 6-bit scales and eight 6-bit minima, then 128 bytes of nibbles. Of each 32
  bytes, the low nibbles are 32 elements and the high nibbles the next 32. w = d * scale * q - dmin * minimum.
- Q6_K: 128 bytes with the elements' low 4 bits, 64 bytes with their high 2 bits, 16 int8 scales, fp16 d.
  w = d * scale * (q - 32).
"""

import numpy as np
import torch
from torch import Tensor

from batchinfer.formats.gguf_file import TYPES

_BYTES = {name: nbytes for name, _, nbytes in TYPES.values()}


def dequantize(data: "np.ndarray[tuple[int], np.dtype[np.uint8]]", kind: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor from its bytes: float32 if it is quantized; F32, F16 and BF16 keep their type."""
    octets = torch.from_numpy(data)
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if kind in plain:
        return octets.view(plain[kind]).view(shape)
    blocks = octets.view(-1, _BYTES[kind])
    return {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_K": _q4_k, "Q6_K": _q6_k}[kind](blocks).view(shape)


def _half(octets: Tensor) -> Tensor:
    """Convert two bytes per block, an fp16 number, to float32 [blocks, 1]."""
    return octets.contiguous().view(torch.float16).float()


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float().mul_(_half(blocks[:, :2]))


def _q4_0(blocks: Tensor) -> Tensor:
    codes = blocks[:, 2:]
    q = torch.cat([codes & 15, codes >> 4], 1)
    return q.float().sub_(8).mul_(_half(blocks[:, :2]))


def _q4_k(blocks: Tensor) -> Tensor:
    d, dmin = _half(blocks[:, :2]), _half(blocks[:, 2:4])
    a, m, x = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([a & 63, (x & 15) | ((a >> 2) & 48)], 1)
    minimum = torch.cat([m & 63, (x >> 4) | ((m >> 2) & 48)], 1)
    runs = blocks[:, 16:].view(-1, 4, 1, 32)
    q = torch.cat([runs & 15, runs >> 4], 2).view(-1, 8, 32)
    return q.float().mul_((scale.float() * d)[..., None]).sub_((minimum.float() * dmin)[..., None])


def _q6_k(blocks: Tensor) -> Tensor:
    low = blocks[:, :128].view(-1, 2, 2, 32)  # halves of 128 elements; in each, two runs of 32 bytes
    high = blocks[:, 128:192].view(-1, 2, 32)
    nibbles = torch.stack([low[:, :, 0] & 15, low[:, :, 1] & 15, low[:, :, 0] >> 4, low[:, :, 1] >> 4], 2)
    pairs = torch.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], 2)
    q = (nibbles | (pairs << 4)).float().sub_(32).view(-1, 16, 16)
    scale = blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks[:, 208:])
    return q.mul_(scale[..., None])
