"""Sequences in a paged cache, made on the device: random keys and values, blocks in no order, NaN where nothing is.

Keys and values are stored by the product's own function, so that nothing here knows how they lie in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from gpu_check.session import Session
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.attention_plan import AttentionPlan, Tiling, plan_attention
from batchinfer.kernels.attention_triton import tiling
from batchinfer.kernels.kv_cache import MOST, KVCache, cache_rows
from batchinfer.kernels.ragged_attention import RaggedBatch, SharedPrefix

AT_A_TIME = 1 << 16
"""Slots that are stored in one call."""


@dataclass(frozen=True)
class Paged:
    """Queries of a step, the cache that they read, and the batch; what is in the cache in float64, if it is known."""

    query: Tensor
    cache: KVCache
    batch: RaggedBatch
    kv: torch.dtype
    kv_heads: int
    known: tuple[Tensor, Tensor] | None = None  # keys and values [slots, kv_heads, head_dim], by slot

    @property
    def scale(self) -> float:
        """Of scores."""
        return float(self.query.shape[2] ** -0.5)

    def plan(
        self, session: Session, processors: int | None, window: int | None = None, tiles: Tiling | None = None
    ) -> AttentionPlan:
        """Plan the step, with the product's tiles if none are given; `processors` is as in `plan_attention`."""
        chosen = tiles or self.tiles(session)
        return plan_attention(self.batch, self.query.shape[1], self.kv_heads, window, chosen, processors)

    def tiles(self, session: Session) -> Tiling:
        """Those that the product takes."""
        heads, head_dim = self.query.shape[1:]
        return tiling(head_dim, heads // self.kv_heads, self.query.dtype, self.kv, session.gpu)

    def expected(self, window: int | None, softcap: float | None = None, sinks_H: Tensor | None = None) -> Tensor:
        """Return torch's own attention in float64, one sequence at a time: [T, heads, head_dim].

        With a `softcap` c, scores s become c * tanh(s / c). `sinks` are scores that count and stand for no value.
        """
        assert self.known is not None
        b, block_size = self.batch, self.cache.block_size
        out = torch.zeros(self.query.shape, dtype=torch.float64, device=self.query.device)
        for s, context in enumerate(b.contexts.tolist()):
            start, end = b.offsets[s : s + 2].tolist()
            at = torch.arange(context, device=out.device)
            slots = b.table[s].long()[at // block_size] * block_size + at % block_size
            key, value = (part[slots].transpose(0, 1) for part in self.known)
            own = torch.arange(context - (end - start), context, device=out.device)[:, None]
            seen = (at <= own) & (at > own - (window or context))
            query = self.query[start:end].double().transpose(0, 1)
            group = len(query) // self.kv_heads
            key, value = (x.repeat_interleave(group, 0) for x in (key, value))
            if softcap is None and sinks_H is None:
                found = F.scaled_dot_product_attention(query[None], key[None], value[None], seen, scale=self.scale)[0]
            else:
                scores = query @ key.transpose(1, 2) * self.scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.masked_fill(~seen, float("-inf")).exp()
                beside = 0.0 if sinks_H is None else sinks_H.double().exp()[:, None, None]
                found = weights @ value / (weights.sum(-1, keepdim=True) + beside)
            out[start:end] = found.transpose(0, 1)
        return out

    def alone(self, s: int, token: int) -> "Paged":
        """One token of a sequence, as if it were decoded."""
        b = self.batch
        new = int(b.offsets[s + 1] - b.offsets[s])
        one = RaggedBatch(np.array([0, 1]), b.contexts[s : s + 1] - new + token + 1, b.table[s : s + 1])
        row = int(b.offsets[s]) + token
        return replace(self, query=self.query[row : row + 1].contiguous(), batch=one)

    def part(self, sequences: int) -> "Paged":
        """The first sequences."""
        b = self.batch
        some = RaggedBatch(b.offsets[: sequences + 1], b.contexts[:sequences], b.table[:sequences])
        return replace(self, query=self.query[: int(some.offsets[-1])].contiguous(), batch=some)


def paged(
    session: Session,
    rows: Sequence[tuple[int, int]],
    heads: tuple[int, int, int],
    query: torch.dtype,
    kv: torch.dtype,
    block_size: int = 32,
    prefixes: tuple[SharedPrefix, ...] = (),
    seed: int = 0,
    known: bool = True,
) -> Paged:
    """`rows` are (context, new tokens), `heads` (of queries, of keys, numbers of each).

    Without `known`, what is in the cache is not kept in float64: for cases that are only timed.
    """
    q_heads, kv_heads, head_dim = heads
    needed = [-(-context // block_size) for context, _ in rows]
    blocks = sum(needed) + 5
    rng = np.random.default_rng(seed)
    order = rng.permutation(blocks - 1) + 1
    ends = np.cumsum([0, *needed])
    table = np.zeros((len(rows), max(needed)), np.int32)  # padded with a block of nobody
    written = np.zeros(blocks * block_size, np.bool_)
    for s, (context, _) in enumerate(rows):
        table[s, : needed[s]] = order[ends[s] : ends[s + 1]]
        for prefix in prefixes:
            if prefix.first < s < prefix.first + prefix.count:
                shared = prefix.keys // block_size
                table[s, :shared] = table[prefix.first, :shared]
        at = np.arange(context)
        written[table[s, at // block_size].astype(np.int64) * block_size + at % block_size] = True
    offsets = np.cumsum([0, *(new for _, new in rows)])
    ragged = RaggedBatch(
        offsets, np.array([context for context, _ in rows]), torch.from_numpy(table).to(session.device), prefixes
    )
    cache = KVCache(blocks, kv_heads, block_size, head_dim, kv, session.device, values_by_column=True)
    kept = _fill(session, cache, torch.from_numpy(np.flatnonzero(written)), (kv_heads, head_dim), kv, seed, known)
    shape = (int(offsets[-1]), q_heads, head_dim)
    x = torch.randn(shape, generator=session.generator(seed + 1), device=session.device)
    return Paged(x.to(query), cache, ragged, kv, kv_heads, kept)


def _fill(
    session: Session, cache: KVCache, slots: Tensor, heads: tuple[int, int], kv: torch.dtype, seed: int, known: bool
) -> tuple[Tensor, Tensor] | None:
    """Store noise into the slots; nothing else in the cache is a number, if it is `known` what is."""
    if known:
        for pool in (cache.key, cache.value, cache.key_scale, cache.value_scale):
            if pool is not None:
                _spoil(pool)
    exact = [
        torch.zeros(int(slots.max()) + 1, *heads, dtype=torch.float64, device=session.device) if known else None
        for _ in range(2)
    ]
    generator = session.generator(seed + 2)
    for some in slots.split(AT_A_TIME):
        key, value = (torch.randn(len(some), *heads, generator=generator, device=session.device) for _ in range(2))
        cache.store(key, value, cache_rows(some, heads[0], cache.block_size).to(session.device))
        for kept, x in zip(exact, (key, value), strict=True):
            if kept is not None:
                kept[some.to(session.device)] = rounded(x, kv)
    return None if exact[0] is None or exact[1] is None else (exact[0], exact[1])


def _spoil(pool: Tensor) -> None:
    if pool.dtype == torch.float8_e4m3fn:
        pool.view(torch.uint8).fill_(0x7F)  # NaN
    else:
        pool.fill_(-128 if pool.dtype == torch.int8 else float("nan"))


def rounded(x: Tensor, kv: torch.dtype) -> Tensor:
    """What a cache of the type keeps of float32 numbers [..., head_dim], in float64."""
    if kv not in MOST:
        return x.to(kv).double()
    step = x.abs().amax(-1, keepdim=True).div(MOST[kv])
    numbers = x.div(step.clamp(min=1e-30))
    numbers = numbers.round() if kv == torch.int8 else numbers.clamp(-MOST[kv], MOST[kv])
    return numbers.to(kv).float().double() * step.double()
