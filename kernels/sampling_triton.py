"""Sampling in Triton without a sort: one pass over the vocabulary where few tokens pass the filters.

A filter keeps the tokens whose logit reaches a border, which `kernels/borders_triton.py` finds. The token is drawn by
Gumbel's trick, with the noise of `kernels/sampling.py`, keyed by row seed, position and token id: among listed tokens
if they are all that pass, else in a pass over the vocabulary.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer.kernels.borders_triton import (
    INFINITE,
    LISTED,
    MINUS_INFINITE,
    NOTHING,
    border_in_list,
    border_in_vocabulary,
    key,
    largest,
    last_of,
    listed_from,
    number,
    order_of,
    ordered,
    token_of,
    weight,
    weights_of,
)
from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.noise_triton import gumbel_of, gumbel_of_four
from batchinfer.kernels.sampling import SamplingBatch
from batchinfer.kernels.shipped_triton import Shipped

_WARPS = 8


@triton.jit
def _sums_from(p_row, vocab, most, temperature, order, LANES: tl.constexpr):
    """Return (number, mass) of all tokens whose order is at least `order`, in one pass."""
    b_count = tl.zeros((LANES,), tl.float32)
    b_mass = b_count
    for start in range(0, vocab, LANES):
        o_v = start + tl.arange(0, LANES)
        b_x = tl.load(p_row + o_v, o_v < vocab, float("-inf"))
        b_in = (o_v < vocab) & (ordered(b_x) >= order.to(tl.int32))
        b_count += tl.where(b_in, 1.0, 0.0)
        b_mass += tl.where(b_in, weight(b_x, most, temperature, False), 0.0)
    return tl.sum(b_count), tl.sum(b_mass)


@triton.jit
def _listed_sums(keys, most, temperature, order):
    """Return (number, mass) of the listed tokens whose order is at least `order`."""
    return (
        listed_from(keys, weights_of(keys, most, temperature, True), order),
        listed_from(keys, weights_of(keys, most, temperature, False), order),
    )


@triton.jit
def _cut(
    keys, p_row, vocab, most, least, whole, listed, count, mass, temperature, top_k, top_p, min_p,
    IN_LIST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Return the least logit, divided by the temperature, that passes all filters.

    `whole` is the mass of all tokens; `count` and `mass` are those of the tokens from the order `listed` on. IN_LIST:
    look among the listed tokens only. The result is then right if all that pass are listed, else too low.
    """
    border, end = least, ordered(most).to(tl.int64) + 1
    k = tl.minimum(top_k, vocab).to(tl.float32)
    for i_filter in range(2):
        counted = i_filter == 0
        if tl.where(counted, top_k > 0, top_p < 1.0):
            wanted, rest = k, vocab.to(tl.float32)
            if i_filter == 1:
                rest = whole
                if top_k > 0:
                    if IN_LIST:
                        more, left = _listed_sums(keys, most, temperature, border + 1)
                    else:
                        more, left = _sums_from(p_row, vocab, most, temperature, border + 1, LANES)
                    # Tokens that tie at the border of top-k count in the mass only until there are k tokens.
                    tied = (k - more) * weight(number(border.to(tl.int32)), most, temperature, False)
                    rest = left + tied
                wanted = top_p * rest
            if IN_LIST:
                weights = weights_of(keys, most, temperature, counted)
                border = border_in_list(keys, weights, wanted, border, end, 0.0)
            else:
                above = tl.where(counted, count, mass)
                if above < wanted:
                    low, high = border, listed
                else:
                    low, high, rest, above = listed, end, above, 0.0
                border = border_in_vocabulary(
                    p_row, vocab, most, temperature, counted, wanted, low, high, above, rest, LANES
                )
    relative = tl.where(min_p > 0.0, tl.div_rn(most, temperature) + tl.log(min_p), float("-inf"))
    return tl.maximum(tl.div_rn(number(border.to(tl.int32)), temperature), relative)


@triton.jit
def _drawn_from_list(keys, temperature, cut, position, seed):
    """Draw among the listed tokens that pass."""
    best = tl.max(tl.full(keys[0].shape, NOTHING, tl.int64))
    for _ in range(LISTED):
        b_key = keys[0]
        b_x = tl.div_rn(number(order_of(b_key)), temperature)
        b_passes = (b_x >= cut) & (b_key != NOTHING)
        if tl.max(b_passes.to(tl.int32)) > 0:
            b_token = token_of(b_key)
            b_score = key(b_x + gumbel_of(b_token, position, seed), b_token)
            best = tl.maximum(best, tl.max(tl.where(b_passes, b_score, NOTHING)))
        keys = (keys[1], keys[2], keys[3], keys[4], keys[5], b_key)
    return token_of(best)


@triton.jit
def _drawn_from_vocabulary(p_row, vocab, temperature, cut, position, seed, LANES: tl.constexpr):
    """Draw among all tokens that pass, in one pass; return the token, and the largest `ordered` logit."""
    b_best = tl.full((LANES // 4, 4), NOTHING, tl.int64)
    b_most = tl.full((LANES // 4, 4), MINUS_INFINITE, tl.int32)
    for start in range(0, vocab, LANES):
        i_counter = start // 4 + tl.arange(0, LANES // 4)
        o_v = i_counter[:, None] * 4 + tl.arange(0, 4)[None, :]
        b_x = tl.load(p_row + o_v, o_v < vocab, float("-inf"))
        b_most = tl.maximum(b_most, ordered(b_x))
        b_x = tl.div_rn(b_x, temperature)
        b_key = key(b_x + gumbel_of_four(i_counter, position, seed), o_v)
        b_best = tl.maximum(b_best, tl.where((b_x >= cut) & (o_v < vocab), b_key, NOTHING))
    return token_of(tl.max(b_best)), tl.max(b_most)


@triton.jit(do_not_specialize=["vocab"])
def _sample_kernel(
    p_logits, p_tokens, p_finite, p_temperature, p_top_k, p_top_p, p_min_p, p_seeds, p_positions,
    vocab, LANES: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * vocab
    temperature = tl.load(p_temperature + i_row)
    top_k, top_p, min_p = tl.load(p_top_k + i_row), tl.load(p_top_p + i_row), tl.load(p_min_p + i_row)
    seed, position = tl.load(p_seeds + i_row), tl.load(p_positions + i_row).to(tl.uint32)

    token, most_order, cut = 0, tl.full((), MINUS_INFINITE, tl.int32), float("-inf")
    from_all = (temperature > 0) & (top_k <= 0) & (top_p >= 1.0) & (min_p <= 0.0)
    if from_all == 0:
        keys, least = largest(p_row, vocab, 1 << 32, LANES)
        likeliest = tl.max(keys[0])
        token, most_order = token_of(likeliest), order_of(likeliest)
        if (temperature > 0) & (most_order > MINUS_INFINITE) & (most_order < INFINITE):
            most, last, whole = number(most_order), last_of(keys), 0.0
            if (top_k <= 0) & (top_p < 1.0):
                _, whole = _sums_from(p_row, vocab, most, temperature, least, LANES)
            count, mass = _listed_sums(keys, most, temperature, last + 1)
            cut = _cut(
                keys, p_row, vocab, most, least, whole, last + 1, count, mass, temperature, top_k, top_p, min_p,
                True, LANES,
            )  # fmt: skip
            # A lane whose last listed token passes may have more of them.
            from_all = (last >= least) & (tl.div_rn(number(last.to(tl.int32)), temperature) >= cut)
            if from_all:
                cut = _cut(
                    keys, p_row, vocab, most, least, whole, last + 1, count, mass, temperature, top_k, top_p, min_p,
                    False, LANES,
                )  # fmt: skip
            else:
                token = _drawn_from_list(keys, temperature, cut, position, seed)
    if from_all:
        token, most_order = _drawn_from_vocabulary(p_row, vocab, temperature, cut, position, seed, LANES)
    tl.store(p_tokens + i_row, token)
    # NaN has the largest order, so that the largest one tells whether all logits are of use.
    tl.store(p_finite + i_row, (most_order > MINUS_INFINITE) & (most_order < INFINITE))


def sample(logits_rV: Tensor, batch: SamplingBatch, gpu: Gpu) -> tuple[Tensor, Tensor]:
    """Draw a token from each row of contiguous float32 logits, as `kernels.sampling.sample` does.

    Returns (token ids int64 [r], finite bool [r]). `finite` is False for a row with a NaN anywhere or an infinite
    maximum; its token means nothing.
    """
    rows, vocab = logits_rV.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits_rV.device)
    finite = torch.empty(rows, dtype=torch.bool, device=logits_rV.device)
    _sample_kernel[(rows,)](
        logits_rV, tokens, finite, batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seeds,
        batch.positions, vocab, LANES=min(_lanes(gpu), triton.next_power_of_2(max(vocab, 16))), num_warps=_WARPS,
    )  # fmt: skip
    return tokens, finite


def _lanes(gpu: Gpu) -> int:
    """Choose the number of lanes for which the kernel spills no register."""
    return 1024 if gpu.capability >= (10, 0) else 2048


def shipped(gpu: Gpu) -> list[Shipped]:
    """List the one kernel, which serves every vocabulary size."""
    types = {"p_logits": "*fp32", "p_tokens": "*i64", "p_finite": "*i1", "p_temperature": "*fp32", "p_top_k": "*i64",
             "p_top_p": "*fp32", "p_min_p": "*fp32", "p_seeds": "*i64", "p_positions": "*i64",
             "vocab": "i32"}  # fmt: skip
    return [Shipped("sample", _sample_kernel, types, {"LANES": _lanes(gpu)}, _WARPS)]
