"""Paged attention of Llama-3-8B's heads against the bandwidth of a copy, or the rate of a product."""

from dataclasses import dataclass

import numpy as np
import torch
from gpu_check import ceilings
from gpu_check.ceilings import Ceilings
from gpu_check.engines import release
from gpu_check.session import Session, name_of
from gpu_check.timing import Clock

from batchinfer.kernels.attention_plan import plan_attention
from batchinfer.kernels.attention_triton import paged_attention, tiling
from batchinfer.kernels.kv_cache import MOST, KVCache
from batchinfer.kernels.ragged_attention import RaggedBatch

TITLE = "Attention, 32 heads, 8 of keys, 128 numbers each"
AIM = 85.0
"""Percent of the copy's bandwidth that decoding is to reach."""
BLOCK = 32
F8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Step:
    """So many sequences of one length, each with so many new tokens."""

    name: str
    sequences: int
    context: int
    new: int
    kv: tuple[torch.dtype, ...]
    deterministic: bool = False
    aimed: bool = False


def run(session: Session) -> None:
    """Decoding, one long context, verification, prompts."""
    ceiling, clock = ceilings.known(session), Clock(session)
    for step in _steps(session):
        for kv in step.kv:
            with session.case(f"{step.name}, {step.sequences} x {step.context}, cache in {name_of(kv)}"):
                _time(session, clock, ceiling, step, kv)
            release(session)


def _steps(session: Session) -> list[Step]:
    every = (session.dtype, torch.int8, F8)
    device = [
        Step("decode", 64, 4096, 1, every, aimed=True),
        Step("decode", 1, 32768, 1, every),
        Step("decode", 512, 512, 1, every),
        Step("verify 5", 64, 4096, 5, every),
        Step("decode, deterministic", 64, 4096, 1, every, deterministic=True),
        Step("prefill", 4, 2048, 2048, every),
        Step("prefill, deterministic", 4, 2048, 2048, (session.dtype,), deterministic=True),
    ]
    smoke = [Step("decode", 2, 40, 1, every[:2], aimed=True), Step("prefill", 1, 20, 20, every[:1])]
    found: list[Step] = session.pick(device, smoke)
    return found


def _time(session: Session, clock: Clock, ceiling: Ceilings, step: Step, kv: torch.dtype) -> None:
    heads, kv_heads, head_dim = session.pick((32, 8, 128), (4, 2, 16))
    cache, batch = _cache(session, step, kv_heads, head_dim, kv)
    tokens = step.sequences * step.new
    query = torch.randn(tokens, heads, head_dim, generator=session.generator(), device=session.device)
    query = query.to(session.dtype)
    processors = None if step.deterministic else session.gpu.processors
    tiles = tiling(head_dim, heads // kv_heads, query.dtype, kv, session.gpu)
    plan = plan_attention(batch, heads, kv_heads, None, tiles, processors)
    times = clock(lambda: paged_attention(query, cache, plan, head_dim**-0.5))
    keys = step.sequences * step.context * kv_heads
    nbytes = 2 * keys * (head_dim * kv.itemsize + (4 if kv in MOST else 0)) + 2 * query.nbytes
    seen = step.sequences * sum(range(step.context - step.new + 1, step.context + 1))
    columns = ceiling.columns(times, nbytes, 4 * seen * heads * head_dim)
    session.row(
        TITLE,
        step=step.name,
        sequences=step.sequences,
        context=step.context,
        cache=name_of(kv),
        **columns,
        partials=plan.partials,
    )
    session.say(f"{step.name} {step.sequences} x {step.context} {name_of(kv)}: {columns['of the ceiling, %']:.0f} %")
    if step.aimed:
        reached = 100 * nbytes / times.seconds / ceiling.bytes_per_second
        aim = f"decoding {step.sequences} x {step.context}, cache in {name_of(kv)}: {AIM:.0f} % of a copy's bandwidth"
        session.findings.aim(aim, f"{reached:.0f} %", reached >= AIM)


def _cache(session: Session, step: Step, kv_heads: int, head_dim: int, kv: torch.dtype) -> tuple[KVCache, RaggedBatch]:
    """Noise, in blocks in no order."""
    a_sequence = -(-step.context // BLOCK)
    blocks = step.sequences * a_sequence + 1
    cache = KVCache(blocks, kv_heads, BLOCK, head_dim, kv, session.device, values_by_column=True)
    generator = session.generator(1)
    shape = (blocks, kv_heads, BLOCK, head_dim)
    for part in ("key", "value"):
        noise = torch.randn(shape, generator=generator, device=session.device, dtype=session.dtype)
        scale = None
        if kv in MOST:
            scale = 0.01 + 0.01 * torch.rand(shape[:3], generator=generator, device=session.device)
            noise = (40 * noise).clamp_(-MOST[kv], MOST[kv])
        getattr(cache, part).copy_(noise.to(kv))
        setattr(cache, f"{part}_scale", scale)
    table = np.random.default_rng(0).permutation(blocks - 1).astype(np.int32).reshape(step.sequences, a_sequence) + 1
    batch = RaggedBatch(
        np.arange(step.sequences + 1) * step.new,
        np.full(step.sequences, step.context),
        torch.from_numpy(table).to(session.device),
    )
    return cache, batch
