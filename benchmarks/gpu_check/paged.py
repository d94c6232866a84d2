"""Sequences in a paged cache, made on the device: random keys and values, blocks in no order, NaN where nothing is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from gpu_check.session import Session
from torch import Tensor

from batchinfer.kernels.kv_cache import MOST, KVCache
from batchinfer.kernels.ragged_attention import RaggedBatch, SharedPrefix, ragged_attention


@dataclass(frozen=True)
class Paged:
    """Queries of a step, the cache that they read, the same cache in float64, and the batch."""

    query: Tensor
    cache: KVCache
    exact: KVCache
    batch: RaggedBatch

    @property
    def scale(self) -> float:
        """Of scores."""
        return float(self.query.shape[2] ** -0.5)

    def expected(self, window: int | None) -> Tensor:
        """By the plain reference in float64."""
        return ragged_attention(self.query.double(), self.exact, self.batch, self.scale, window)

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
) -> Paged:
    """`rows` are (context, new tokens), `heads` (of queries, of keys, numbers of each)."""
    q_heads, kv_heads, head_dim = heads
    needed = [-(-context // block_size) for context, _ in rows]
    blocks = sum(needed) + 5
    rng = np.random.default_rng(seed)
    order = iter((rng.permutation(blocks - 1) + 1).tolist())
    table = np.zeros((len(rows), max(needed)), np.int32)  # padded with a block of nobody
    written = np.zeros((blocks, block_size), np.bool_)
    for s, (context, _) in enumerate(rows):
        table[s, : needed[s]] = [next(order) for _ in range(needed[s])]
        for prefix in prefixes:
            if prefix.first < s < prefix.first + prefix.count:
                shared = prefix.keys // block_size
                table[s, :shared] = table[prefix.first, :shared]
        at = np.arange(context)
        written[table[s, at // block_size], at % block_size] = True
    offsets = np.cumsum([0, *(new for _, new in rows)])
    ragged = RaggedBatch(
        offsets, np.array([context for context, _ in rows]), torch.from_numpy(table).to(session.device), prefixes
    )
    cache, exact = _caches(session, torch.from_numpy(written), kv_heads, head_dim, kv, seed)
    shape = (int(offsets[-1]), q_heads, head_dim)
    x = torch.randn(shape, generator=session.generator(seed + 1), device=session.device)
    return Paged(x.to(query), cache, exact, ragged)


def _caches(
    session: Session, written: Tensor, kv_heads: int, head_dim: int, kv: torch.dtype, seed: int
) -> tuple[KVCache, KVCache]:
    blocks, block_size = written.shape
    cache = KVCache(blocks, kv_heads, block_size, head_dim, kv, session.device, values_by_column=True)
    exact = KVCache(1, kv_heads, block_size, head_dim, torch.float32, session.device)
    nothing = ~written.to(session.device)[:, None, :, None]
    generator = session.generator(seed + 2)
    for part in ("key", "value"):
        shape = (blocks, kv_heads, block_size, head_dim)
        x = torch.randn(shape, generator=generator, device=session.device).masked_fill_(nothing, float("nan"))
        scale = None
        if kv in MOST:
            scale = x.abs().amax(-1) / MOST[kv]
            x = x / scale[..., None]
            x = x.round().nan_to_num(-128) if kv == torch.int8 else x
        stored = x.to(kv)
        getattr(cache, part).copy_(stored)
        setattr(cache, f"{part}_scale", scale)
        numbers = stored.float().double()
        setattr(exact, part, numbers if scale is None else numbers * scale[..., None].double())
    return cache, exact
