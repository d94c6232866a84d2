"""Paged attention on the CPU against dense attention, with NaN wherever nothing may be read."""

import numpy as np
import pytest
import torch
from torch import Tensor

from batchinfer.engine.attention_inputs import TiledInputs
from batchinfer.kernels.attention import attention
from batchinfer.kernels.attention_shape import AttentionShape
from batchinfer.kernels.kv_cache import KVCache, cache_rows
from batchinfer.models.batch import PromptChunk


class _Table:
    def __init__(self, blocks: np.ndarray, block_size: int) -> None:
        self.blocks, self.block_size = blocks, block_size


def of_shape(window: int | None, heads: int, kv_heads: int, head_dim: int) -> tuple[TiledInputs, AttentionShape]:
    shape = AttentionShape(window, heads, kv_heads, head_dim)
    return TiledInputs([shape]), shape


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """One sequence in float64: q [t, heads, d] are its last t positions, k and v [n, kv_heads, d] all."""
    t, heads, d = q.shape
    n = len(k)
    k, v = (x.double().repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thd,nhd->htn", q.double(), k) * d**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position, key = torch.arange(n - t, n)[:, None], torch.arange(n)
    seen = (key <= position) & (key > position - (window or n))
    weights = scores.masked_fill(~seen, float("-inf")).exp()
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.double().exp()[:, None, None])
    return torch.einsum("htn,nhd->thd", weights / total, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("block_size", [8, 32, 64])
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize(("softcap", "sunk"), [(None, False), (1.0, False), (None, True), (1.0, True)])
@pytest.mark.parametrize("crowded", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 24), (4, 4, 64)])
def test_paged_attention_is_dense_attention(
    dtype: torch.dtype,
    block_size: int,
    window: int | None,
    softcap: float | None,
    sunk: bool,
    crowded: bool,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    """Shuffled block tables in a pool full of other values; prompts of awkward lengths, then one token of each."""
    rng = np.random.default_rng(0)
    lengths = [1, 15, 16, 17, 63, 64, 65, 150]
    keys, values = ([torch.randn(n, kv_heads, head_dim) for n in lengths] for _ in range(2))
    table = np.zeros((len(lengths), 192 // block_size), np.int64)
    needed = [-(-n // block_size) for n in lengths]
    pool = sum(needed) + 1 if crowded else 8 * sum(needed)
    free = rng.permutation(np.arange(1, pool))
    for i, count in enumerate(needed):
        table[i, :count], free = free[:count], free[count:]
    cache = KVCache(pool, kv_heads, block_size, head_dim, dtype)
    for leftover in (cache.key, cache.value):
        leftover.copy_(torch.randint(-100, 100, leftover.shape))
    for i, n in enumerate(lengths):
        slots = torch.from_numpy(table[i][np.arange(n) // block_size] * block_size + np.arange(n) % block_size)
        cache.store(keys[i], values[i], cache_rows(slots, kv_heads, block_size))

    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.int8: 3e-2}[dtype]
    rows = np.cumsum([0, *lengths])
    sequences, none = _Table(table, block_size), np.empty(0, np.int64)
    inputs, shape = of_shape(window, heads, kv_heads, head_dim)
    prompts = inputs(sequences, [PromptChunk(i, 0, n, int(rows[i])) for i, n in enumerate(lengths)], none, none)
    query = torch.randn(rows[-1], heads, head_dim)
    sinks = torch.randn(heads) * 3 if sunk else None
    out = attention(query, cache, prompts[shape], head_dim**-0.5, softcap, sinks)
    decode = inputs(sequences, [], np.arange(len(lengths)), np.array(lengths) - 1)[shape]
    assert isinstance(decode.decode.users[0].blocks, slice) == crowded or window is not None
    last = torch.from_numpy(rows[1:] - 1)
    out_last = attention(query[last], cache, decode, head_dim**-0.5, softcap, sinks)
    for i, n in enumerate(lengths):
        expected = dense_attention(query[rows[i] : rows[i] + n], keys[i], values[i], window, softcap, sinks)
        torch.testing.assert_close(out[rows[i] : rows[i] + n].double(), expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(out_last[i].double(), expected[-1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 24), (4, 4, 64), (3, 1, 16), (32, 8, 64)])
def test_a_query_has_the_same_bits_alone_and_with_others_at_its_blocks(
    dtype: torch.dtype, window: int | None, heads: int, kv_heads: int, head_dim: int
) -> None:
    """Sequences whose first blocks are the same ones, and up to five queries of each."""
    rng = np.random.default_rng(0)
    size, blocks = 16, 60
    cache = KVCache(blocks, kv_heads, size, head_dim, dtype)
    slots = torch.arange(blocks * size)
    data = torch.randn(2, blocks * size, kv_heads, head_dim)
    cache.store(data[0], data[1], cache_rows(slots, kv_heads, size))
    table = np.zeros((9, 8), np.int64)
    shared = [0, 6, 6, 6, 3, 3, 6, 1, 0]  # leading blocks that are those of the first
    table[0], free = np.arange(1, 9), iter(rng.permutation(np.arange(9, blocks)).tolist())
    for i, count in enumerate(shared[1:], 1):
        table[i, :count] = table[0, :count]
        table[i, count:] = [next(free) for _ in range(8 - count)] if count != 6 else [next(free), 0]
    first = np.array([90, 100, 99, 95, 70, 63, 106, 2, 0])
    count = np.array([5, 1, 5, 3, 1, 2, 4, 5, 1])
    places = np.repeat(np.arange(9), count)
    positions = np.concatenate([np.arange(p, p + c) for p, c in zip(first, count, strict=True)])
    query = torch.randn(len(places), heads, head_dim)
    inputs, shape = of_shape(window, heads, kv_heads, head_dim)
    sequences = _Table(table, size)
    batch = inputs(sequences, [], places, positions)[shape]
    assert {users.queries.shape[1] for users in batch.decode.users} > {1}
    together = attention(query, cache, batch, head_dim**-0.5)
    for i in range(len(places)):
        alone = inputs(sequences, [], places[i : i + 1], positions[i : i + 1])[shape]
        assert torch.equal(attention(query[i : i + 1], cache, alone, head_dim**-0.5)[0], together[i]), f"query {i}"
