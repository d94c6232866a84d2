"""Sampling in Triton without a sort: thresholds are found by bisection, and one pass draws by Gumbel's trick.

A filter keeps the tokens whose logit reaches a threshold: the largest at which k tokens, or a share p of the
probability, are kept. float32 numbers map to integers in the same order, so bisection finds the threshold exactly, in
33 halvings. The noise is that of `kernels/sampling.py`, keyed by row seed, position and token id.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.sampling import SamplingBatch
from batchinfer.kernels.shipped_triton import Shipped

_BLOCK, _WARPS = 4096, 16


@triton.jit
def _ordered(b_x):
    """Map float32 numbers to int32 in the same order; 0 and -0 become equal."""
    b_bits = (b_x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _minus_log_uniform(b_word):
    """Return -log(u) in float32, where u = (word + 0.5) / 2^32 for 32 random bits.

    For u near 1 it is computed from 1 - u, which float32 can hold more exactly.
    """
    b_low = -tl.log((b_word.to(tl.float32) + 0.5) * 2.0**-32)
    b_missing = ((b_word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.0**-32
    b_rest = 1.0 - b_missing
    b_high = tl.where(b_rest == 1.0, b_missing, tl.log(b_rest) * b_missing / (b_rest - 1.0))
    return tl.where(b_word < 0x80000000, b_low, b_high)


@triton.jit
def _gumbel(i_counter, position, seed):
    """Return the noise [n, 4] of the token ids 4 * counter + 0, 1, 2 and 3."""
    b_0, b_1, b_2, b_3 = tl.philox(seed, i_counter, position, 0 * i_counter, 0 * i_counter)
    b_words = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), [i_counter.shape[0], 4])
    return -tl.log(_minus_log_uniform(b_words.to(tl.uint32)))


@triton.jit
def _mass_from(p_row, vocab, temperature, most, low, count: tl.constexpr, BLOCK: tl.constexpr):
    """Sum over the tokens whose `_ordered` logit is at least `low`: 1 each if `count`, else exp(logit - most)."""
    total = 0.0
    for start in range(0, vocab, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        b_x = tl.load(p_row + o_v, o_v < vocab, float("-inf")) / temperature
        b_kept = (_ordered(b_x) >= low) & (o_v < vocab)
        b_mass = tl.where(b_kept, 1.0 if count else tl.exp(b_x - most), 0.0)
        total += tl.sum(b_mass)
    return total


@triton.jit
def _threshold(p_row, vocab, temperature, most, wanted, floor, count: tl.constexpr, BLOCK: tl.constexpr):
    """Find the largest threshold, not below `floor`, from which on the tokens' mass is at least `wanted`.

    Thresholds are `_ordered` numbers. The mass from `floor` on must reach `wanted`.
    """
    low, high = floor.to(tl.int64), _ordered(most).to(tl.int64) + 1
    for _ in range(33):
        middle = (low + high) >> 1
        enough = _mass_from(p_row, vocab, temperature, most, middle.to(tl.int32), count, BLOCK) >= wanted
        searching = high - low > 1
        low = tl.where(searching & enough, middle, low)
        high = tl.where(searching & (enough == 0), middle, high)
    return low.to(tl.int32)


@triton.jit
def _sample_kernel(
    p_logits, p_tokens, p_finite, p_temperature, p_top_k, p_top_p, p_min_p, p_seeds, p_positions,
    vocab, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * vocab
    temperature = tl.load(p_temperature + i_row)
    top_k, top_p, min_p = tl.load(p_top_k + i_row), tl.load(p_top_p + i_row), tl.load(p_min_p + i_row)
    drawn = temperature > 0
    divisor = tl.where(drawn, temperature, 1.0)

    most, broken = float("-inf"), 0.0
    for start in range(0, vocab, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        b_x = tl.load(p_row + o_v, o_v < vocab, float("-inf"))
        most = tl.maximum(most, tl.max(b_x))
        broken += tl.sum(tl.where(b_x != b_x, 1.0, 0.0))
    finite = (broken == 0) & (most > float("-inf")) & (most < float("inf"))
    tl.store(p_finite + i_row, finite)
    most = tl.where(finite, most, 0.0) / divisor

    floor = tl.full((), -0x80000000, tl.int32)
    if drawn & finite:
        if top_k > 0:
            floor = _threshold(p_row, vocab, divisor, most, tl.minimum(top_k, vocab).to(tl.float32), floor, True, BLOCK)
        if top_p < 1.0:
            wanted = top_p * _mass_from(p_row, vocab, divisor, most, floor, False, BLOCK)
            floor = _threshold(p_row, vocab, divisor, most, wanted, floor, False, BLOCK)
        if min_p > 0.0:
            floor = tl.maximum(floor, _ordered(most + tl.log(min_p)))

    seed, position = tl.load(p_seeds + i_row), tl.load(p_positions + i_row).to(tl.uint32)
    best, token = float("-inf"), 0
    DRAWN: tl.constexpr = BLOCK // 2  # tokens whose noise fits in registers at a time
    for start in range(0, vocab, DRAWN):
        i_counter = start // 4 + tl.arange(0, DRAWN // 4)
        o_v = i_counter[:, None] * 4 + tl.arange(0, 4)[None, :]
        b_x = tl.load(p_row + o_v, o_v < vocab, float("-inf")) / divisor
        b_score = b_x
        if drawn:
            b_score += _gumbel(i_counter.to(tl.uint32), position, seed)
        b_score = tl.where((_ordered(b_x) >= floor) & (o_v < vocab), b_score, float("-inf"))
        b_flat = tl.reshape(b_score, [DRAWN])
        found = tl.max(b_flat)
        if found > best:
            best = found
            token = start + tl.argmax(b_flat, 0, tie_break_left=True)
    tl.store(p_tokens + i_row, token)


def sample(logits_rV: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Draw a token from each row of contiguous float32 logits, as `kernels.sampling.sample` does.

    Returns (token ids int64 [r], finite bool [r]). `finite` is False for a row with a NaN anywhere or an infinite
    maximum; its token means nothing.
    """
    rows, vocab = logits_rV.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits_rV.device)
    finite = torch.empty(rows, dtype=torch.bool, device=logits_rV.device)
    _sample_kernel[(rows,)](
        logits_rV, tokens, finite, batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seeds,
        batch.positions, vocab, BLOCK=min(_BLOCK, triton.next_power_of_2(max(vocab, 16))), num_warps=_WARPS,
    )  # fmt: skip
    return tokens, finite


def shipped(gpu: Gpu) -> list[Shipped]:
    """List the one kernel, which serves every vocabulary size."""
    types = {"p_logits": "*fp32", "p_tokens": "*i64", "p_finite": "*i1", "p_temperature": "*fp32", "p_top_k": "*i64",
             "p_top_p": "*fp32", "p_min_p": "*fp32", "p_seeds": "*i64", "p_positions": "*i64",
             "vocab": "i32"}  # fmt: skip
    return [Shipped("sample", _sample_kernel, types, {"BLOCK": _BLOCK}, _WARPS)]
