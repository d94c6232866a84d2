"""Banning in Triton what grammars do not allow: one pass that writes the banned logits alone."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl
from torch import Tensor

from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.shipped_triton import Shipped

_WORDS = 64  # of 32 tokens, in a program


@triton.jit
def _allow_kernel(p_logits, p_bits, vocab, words, WORDS: tl.constexpr):
    i_row = tl.program_id(1).to(tl.int64)
    o_w = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    b_bits = tl.load(p_bits + i_row * words + o_w, o_w < words, 0)
    o_bit = tl.arange(0, 32)
    o_wb = o_w[:, None] * 32 + o_bit[None, :]
    m_banned = ((b_bits[:, None] >> o_bit[None, :]) & 1) == 0
    b_never = tl.full((WORDS, 32), float("-inf"), tl.float32)
    tl.store(p_logits + i_row * vocab + o_wb, b_never, m_banned & (o_wb < vocab))


def allow_tokens(logits_rV: Tensor, bits_rW: Tensor) -> None:
    """Do as `allow_tokens` of `kernels/logits.py`, on contiguous float32 logits and bits on their device."""
    rows, vocab = logits_rV.shape
    words = bits_rW.shape[1]
    _allow_kernel[(triton.cdiv(words, _WORDS), rows)](logits_rV, bits_rW, vocab, words, WORDS=_WORDS, num_warps=4)


def shipped(gpu: Gpu) -> list[Shipped]:
    """List the kernel."""
    types = {"p_logits": "*fp32", "p_bits": "*i32", "vocab": "i32", "words": "i32"}
    return [Shipped("allow_tokens", _allow_kernel, types, {"WORDS": _WORDS}, 4)]
