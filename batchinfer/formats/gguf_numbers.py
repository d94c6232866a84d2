"""Dequantizing GGUF tensors. The layouts are ggml's: blocks of 32 or 256 elements, each with its own scales.

Blocks of 32. d and m are fp16. The low nibbles of 16 bytes are elements 0 to 15, the high nibbles elements 16 to 31.

- Q8_0: d, then 32 int8. w = d * q.
- Q4_0: d, then nibbles. w = d * (q - 8).
- Q4_1: d, m, then nibbles. w = d * q + m.
- Q5_0, Q5_1: as Q4_0 (less 16, not 8) and Q4_1, with 32 bits before the nibbles: the elements' fifth bits.
- IQ4_NL: d, then nibbles, which are places in `_NONLINEAR`. w = d * value.
- MXFP4: an exponent in one byte (128 is 1), then nibbles, which are places in `_E2M1`. w = 2 ** (e - 128) * value.

Blocks of 256. d and dmin are fp16. Codes are cut from runs of 32 bytes: the lowest bits of all 32 bytes are the run's
first 32 elements, the next bits of all 32 the next, and so on.

- Q2_K: 16 bytes, each with a 4-bit scale and, above it, a 4-bit minimum of 16 elements; 64 bytes of 2-bit codes; d,
  dmin. w = d * scale * q - dmin * minimum.
- Q3_K: 32 bytes with the elements' third bits, 64 bytes with their low 2 bits, 12 bytes with 6-bit scales of 16
  elements, d. w = d * (scale - 32) * (q - 4).
- Q4_K: d, dmin, 12 bytes with 6-bit scales and minima of 32 elements, 128 bytes of nibbles.
  w = d * scale * q - dmin * minimum.
- Q5_K: as Q4_K, with 32 bytes before the nibbles: the elements' fifth bits.
- Q6_K: 128 bytes with the elements' low 4 bits (in runs of 64 bytes), 64 bytes with their high 2 bits, 16 int8 scales
  of 16 elements, d. w = d * scale * (q - 32).
- IQ4_XS: d, 16 bits with the high 2 bits of the scales of 32 elements, 4 bytes with their low 4 bits, then nibbles in
  runs of 16 bytes, which are places in `_NONLINEAR`. w = d * (scale - 32) * value.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from batchinfer.formats.gguf_file import TYPES

_PIECE = 1 << 20  # elements dequantized at once: what lies between the file and the result is some 10 MB
_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the numbers


def dequantize(data: "np.ndarray[tuple[int], np.dtype[np.uint8]]", kind: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor from its bytes, which may be mapped: float32 if quantized; F32, F16 and BF16 keep their type.

    Beside the tensor, memory is used for a small piece of it alone.
    """
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if kind in plain:
        return torch.from_numpy(data.copy()).view(plain[kind]).view(shape)
    elements, nbytes = next((elements, nbytes) for name, elements, nbytes in TYPES.values() if name == kind)
    blocks = data.reshape(-1, nbytes)
    tensor = torch.empty(len(blocks), elements)
    step = _PIECE // elements
    for start in range(0, len(blocks), step):
        piece = torch.from_numpy(blocks[start : start + step].copy())
        tensor[start : start + step] = _BY_TYPE[kind](piece).view(-1, elements)
    return tensor.view(shape)


def _half(octets: Tensor) -> Tensor:
    """Convert two bytes per block, an fp16 number, to float32 [blocks, 1]."""
    return octets.contiguous().view(torch.float16).float()


def _signed(octets: Tensor) -> Tensor:
    """Convert int8 numbers to float32."""
    return octets.contiguous().view(torch.int8).float()


def _codes(octets: Tensor, run: int, bits: int) -> Tensor:
    """Cut bytes [blocks, runs * run] into codes of so many bits [blocks, all], in the order of the elements."""
    runs = octets.reshape(len(octets), -1, 1, run)
    parts = [(runs >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.cat(parts, 2).flatten(1)


def _fifth_bits(octets: Tensor) -> Tensor:
    """Unpack four bytes per block to the bits of its 32 elements, as 0 or 16 [blocks, 32]."""
    places = torch.arange(8, dtype=torch.uint8)
    return (((octets[:, :, None] >> places) & 1) << 4).flatten(1)


def _looked_up(codes: Tensor, table: tuple[int, ...]) -> Tensor:
    return torch.tensor(table, dtype=torch.float32)[codes.int()]


def _q8_0(blocks: Tensor) -> Tensor:
    return _signed(blocks[:, 2:]).mul_(_half(blocks[:, :2]))


def _q4_0(blocks: Tensor) -> Tensor:
    return _codes(blocks[:, 2:], 16, 4).float().sub_(8).mul_(_half(blocks[:, :2]))


def _q4_1(blocks: Tensor) -> Tensor:
    return _codes(blocks[:, 4:], 16, 4).float().mul_(_half(blocks[:, :2])).add_(_half(blocks[:, 2:4]))


def _q5_0(blocks: Tensor) -> Tensor:
    q = _codes(blocks[:, 6:], 16, 4) | _fifth_bits(blocks[:, 2:6])
    return q.float().sub_(16).mul_(_half(blocks[:, :2]))


def _q5_1(blocks: Tensor) -> Tensor:
    q = _codes(blocks[:, 8:], 16, 4) | _fifth_bits(blocks[:, 4:8])
    return q.float().mul_(_half(blocks[:, :2])).add_(_half(blocks[:, 2:4]))


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _looked_up(_codes(blocks[:, 2:], 16, 4), _NONLINEAR).mul_(_half(blocks[:, :2]))


def _mxfp4(blocks: Tensor) -> Tensor:
    scale = torch.exp2(blocks[:, :1].double() - 128).float()
    return _looked_up(_codes(blocks[:, 1:], 16, 4), _E2M1).mul_(scale)


def _q2_k(blocks: Tensor) -> Tensor:
    scale = (blocks[:, :16] & 15).float() * _half(blocks[:, 80:82])
    minimum = (blocks[:, :16] >> 4).float() * _half(blocks[:, 82:84])
    q = _codes(blocks[:, 16:80], 32, 2).view(-1, 16, 16)
    return q.float().mul_(scale[..., None]).sub_(minimum[..., None])


def _q3_k(blocks: Tensor) -> Tensor:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    scale = (_codes(low, 8, 4) | (_codes(high, 4, 2) << 4)).float().sub_(32) * _half(blocks[:, 108:])
    q = _codes(blocks[:, 32:96], 32, 2) | (_codes(blocks[:, :32], 32, 1) << 2)
    return q.float().sub_(4).view(-1, 16, 16).mul_(scale[..., None])


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled(_codes(blocks[:, 16:], 32, 4), blocks)


def _q5_k(blocks: Tensor) -> Tensor:
    return _scaled(_codes(blocks[:, 48:], 32, 4) | (_codes(blocks[:, 16:48], 32, 1) << 4), blocks)


def _scaled(q: Tensor, blocks: Tensor) -> Tensor:
    """Apply the scales and minima of Q4_K and Q5_K: of each of four bytes a, m and x, six bits and parts of others."""
    d, dmin = _half(blocks[:, :2]), _half(blocks[:, 2:4])
    a, m, x = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([a & 63, (x & 15) | ((a >> 2) & 48)], 1)
    minimum = torch.cat([m & 63, (x >> 4) | ((m >> 2) & 48)], 1)
    return q.float().view(-1, 8, 32).mul_((scale.float() * d)[..., None]).sub_((minimum.float() * dmin)[..., None])


def _q6_k(blocks: Tensor) -> Tensor:
    q = _codes(blocks[:, :128], 64, 4) | (_codes(blocks[:, 128:192], 32, 2) << 4)
    scale = _signed(blocks[:, 192:208]) * _half(blocks[:, 208:])
    return q.float().sub_(32).view(-1, 16, 16).mul_(scale[..., None])


def _iq4_xs(blocks: Tensor) -> Tensor:
    low, high = blocks[:, 4:8, None], blocks[:, 2:4, None]
    low = (low >> torch.tensor([0, 4], dtype=torch.uint8)) & 15
    high = (high >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)) & 3
    scale = (low.flatten(1) | (high.flatten(1) << 4)).float().sub_(32) * _half(blocks[:, :2])
    values = _looked_up(_codes(blocks[:, 8:], 16, 4), _NONLINEAR)
    return values.view(-1, 8, 32).mul_(scale[..., None])


_BY_TYPE: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip
