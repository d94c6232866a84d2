"""Merging partial results of attention over different keys: each is weighted by its keys' softmax weights."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl
from torch import Tensor

from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.shipped_triton import Shipped

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _merge_kernel(
    p_partial, p_lse, p_first, p_merged, p_sinks, p_out,
    HEAD: tl.constexpr, SINKS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # Each program computes one head of one token.
    heads, i_head = tl.num_programs(1), tl.program_id(1)
    i_token = tl.load(p_merged + tl.program_id(0)).to(tl.int64)
    first, end = tl.load(p_first + i_token), tl.load(p_first + i_token + 1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < HEAD) & (end > first)  # a token without partials keeps its row
    p_lse += first.to(tl.int64) * heads + i_head
    p_partial += (first.to(tl.int64) * heads + i_head) * HEAD

    o_s = tl.arange(0, BLOCK_S)
    b_most = tl.full((BLOCK_S,), float("-inf"), tl.float32)
    for start in range(0, end - first, BLOCK_S):
        b_lse = tl.load(p_lse + (start + o_s).to(tl.int64) * heads, start + o_s < end - first, float("-inf"))
        b_most = tl.maximum(b_most, b_lse)
    most = tl.max(b_most)
    most = tl.where(most == float("-inf"), 0.0, most)

    # Partials are added one by one, in order, so a partial without keys (weight 0) changes no bit.
    b_sum = tl.zeros((BLOCK_D,), tl.float32)
    total = 0.0
    for _ in tl.range(0, end - first, loop_unroll_factor=4):
        weight = tl.exp2(tl.load(p_lse) - most)
        b_sum += weight * tl.load(p_partial + o_d, m_d, 0.0)
        total += weight
        p_lse += heads
        p_partial += heads * HEAD
    if SINKS:
        total += tl.exp2(tl.load(p_sinks + i_head) * LOG2_E - most)
    b_out = b_sum / tl.where(total == 0.0, 1.0, total)
    tl.store(p_out + (i_token * heads + i_head) * HEAD + o_d, b_out.to(p_out.dtype.element_ty), m_d)


def merge_partials(
    partial_PHd: Tensor,
    lse_PH: Tensor,
    first_T: Tensor,
    merged_m: Tensor,
    out_THd: Tensor,
    sinks_H: Tensor | None = None,
) -> None:
    """Write the rows `merged` of `out`, each merged from its token's partials.

    A partial is an output [heads, head_dim] that is divided by the sum of its weights, and that sum's base-2
    logarithm [heads] (-inf where no key was seen); both are float32. Token t has the partials first[t] up to
    first[t + 1]. `first` and `merged` are int32. `sinks` are float32 scores that count in softmax and stand for
    no value.
    """
    heads, head_dim = out_THd.shape[1:]
    _merge_kernel[(len(merged_m), heads)](
        partial_PHd, lse_PH, first_T, merged_m, lse_PH if sinks_H is None else sinks_H, out_THd,
        HEAD=head_dim, SINKS=sinks_H is not None, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_S=32, num_warps=1,
    )  # fmt: skip


def shipped(gpu: Gpu) -> list[Shipped]:
    """List the kernel for every head size."""
    return [
        Shipped(
            f"merge_partials, heads of {head_dim}",
            _merge_kernel,
            {
                "p_partial": "*fp32",
                "p_lse": "*fp32",
                "p_first": "*i32",
                "p_merged": "*i32",
                "p_sinks": "*fp32",
                "p_out": "*bf16",
            },
            {"HEAD": head_dim, "SINKS": True, "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_S": 32},
            1,
        )
        for head_dim in (64, 80, 96, 128, 256)
    ]
