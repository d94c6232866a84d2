"""Verifying drafts in one Triton launch, which never waits for the host and can be part of a CUDA graph."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.shipped_triton import Shipped
from batchinfer.kernels.speculative import Drafts, Verified


@triton.jit
def _verify_kernel(
    p_offsets, p_tokens, p_lengths, p_room, p_ignore_eos, p_eos, p_targets, p_target_finite,
    p_accepted, p_new, p_newest, p_new_lengths, p_finite, eos_count, width, BLOCK: tl.constexpr,
):  # fmt: skip
    # Each program verifies one sequence.
    i_s = tl.program_id(0).to(tl.int64)
    start, end = tl.load(p_offsets + i_s).to(tl.int64), tl.load(p_offsets + i_s + 1).to(tl.int64)
    room, ignore_eos = tl.load(p_room + i_s), tl.load(p_ignore_eos + i_s)
    o_k = tl.arange(0, BLOCK)
    m_k = (o_k < end - start) & (o_k < room) & (o_k < width)
    m_draft = m_k & (o_k > 0)
    b_token = tl.load(p_tokens + start + o_k, m_draft, 0)
    b_before = tl.load(p_targets + start + o_k - 1, m_draft, 0)
    b_target = tl.load(p_targets + start + o_k, m_k, 0)
    b_finite = tl.load(p_target_finite + start + o_k, m_k, 1)

    b_breaks = b_before != b_token
    if ignore_eos == 0:
        for i_eos in range(eos_count):
            b_breaks |= b_before == tl.load(p_eos + i_eos)
    # Tokens count up to the first draft that is rejected.
    new = tl.min(tl.where(m_k & ((o_k == 0) | (b_breaks == 0)), BLOCK, o_k))
    m_new = o_k < new
    tl.store(p_accepted + i_s, tl.maximum(new - 1, 0))
    tl.store(p_new + i_s * width + o_k, tl.where(m_new, b_target, -1), o_k < width)
    tl.store(p_newest + i_s, tl.sum(tl.where(o_k == new - 1, b_target, 0)))
    tl.store(p_new_lengths + i_s, tl.load(p_lengths + i_s) + new)
    tl.store(p_finite + i_s, tl.sum(tl.where(m_new & (b_finite == 0), 1, 0)) == 0)


def verify(drafts: Drafts, targets_T: Tensor, finite_T: Tensor) -> Verified:
    """Compare drafts with targets as `kernels.speculative.verify` does. All tensors are contiguous."""
    sequences, width, device = len(drafts.lengths), drafts.most + 1, targets_T.device
    accepted, newest, new_lengths = (torch.empty(sequences, dtype=torch.int64, device=device) for _ in range(3))
    new_tokens = torch.empty(sequences, width, dtype=torch.int64, device=device)
    finite = torch.empty(sequences, dtype=torch.bool, device=device)
    _verify_kernel[(sequences,)](
        drafts.offsets, drafts.tokens, drafts.lengths, drafts.room, drafts.ignore_eos, drafts.eos_ids,
        targets_T, finite_T, accepted, new_tokens, newest, new_lengths, finite,
        len(drafts.eos_ids), width, BLOCK=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip
    return Verified(accepted, new_tokens, newest, new_lengths, finite)


def shipped(gpu: Gpu) -> list[Shipped]:
    """List the kernel for up to 1, 2, ... 16 tokens of a sequence in a step: the newest known token and its drafts."""
    types = {"p_offsets": "*i64", "p_tokens": "*i64", "p_lengths": "*i64", "p_room": "*i64", "p_ignore_eos": "*i1",
             "p_eos": "*i64", "p_targets": "*i64", "p_target_finite": "*i1", "p_accepted": "*i64", "p_new": "*i64",
             "p_newest": "*i64", "p_new_lengths": "*i64", "p_finite": "*i1", "eos_count": "i32",
             "width": "i32"}  # fmt: skip
    return [
        Shipped(f"verify, up to {block} tokens of a sequence", _verify_kernel, types, {"BLOCK": block}, 1)
        for block in (1, 2, 4, 8, 16)
    ]
