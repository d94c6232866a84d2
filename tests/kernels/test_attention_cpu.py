"""Attention in C against attention in float64, and its bits: alone, together, in chunks, behind a shared prefix."""

import ctypes
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from compiled import libraries
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchinfer.kernels.attention_cpu import MOST_HEAD_DIM, WindowedBatch, attention
from batchinfer.kernels.kv_cache import KVCache, cache_rows
from batchinfer.kernels.ragged_attention import RaggedBatch, SharedPrefix, ragged_attention

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]


def step(
    contexts: list[int], new: list[int], heads: int, kv_heads: int, head_dim: int, kv: torch.dtype, block_size: int = 16
) -> tuple[Tensor, KVCache, RaggedBatch]:
    """Return queries, a cache full of keys and values, and sequences with shuffled blocks."""
    per = -(-max(contexts) // block_size)
    blocks = len(contexts) * per + 1
    cache = KVCache(blocks, kv_heads, block_size, head_dim, kv, keys_by_column=True)
    slots = torch.arange(blocks * block_size)
    stored = torch.randn(2, len(slots), kv_heads, head_dim)
    cache.store(*stored, cache_rows(slots, kv_heads, block_size))
    table = (torch.randperm(len(contexts) * per) + 1).to(torch.int32).view(len(contexts), per)
    offsets = np.concatenate([[0], np.cumsum(new)]).astype(np.int64)
    query = torch.randn(int(offsets[-1]), heads, head_dim)
    return query, cache, RaggedBatch(offsets, np.array(contexts), table.contiguous())


def exact(
    query: Tensor, cache: KVCache, batch: RaggedBatch, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    sunk = None if sinks is None else sinks.double()
    return ragged_attention(query.double(), cache, batch, query.shape[-1] ** -0.5, window, softcap, sunk)


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("kv", TYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(8, 2, 64, 32), (4, 4, 20, 16), (7, 1, 80, 64), (70, 1, 16, 16), (6, 3, 256, 32), (2, 1, 512, 16)],
)
@pytest.mark.parametrize(("window", "softcap", "sunk"), [(None, None, False), (50, 2.0, False), (1, None, True)])
def test_attention_in_c_is_attention(
    library: ctypes.CDLL,
    kv: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    softcap: float | None,
    sunk: bool,
) -> None:
    query, cache, batch = step([1, 16, 65, 200, 300], [1, 3, 65, 1, 100], heads, kv_heads, head_dim, kv, block_size)
    sinks = torch.randn(heads) if sunk else None
    padded = torch.cat([query, torch.full_like(query[:3], float("nan"))])
    out = attention(library, padded, cache, WindowedBatch(batch, window), head_dim**-0.5, softcap, sinks)
    expected = exact(query, cache, batch, window, softcap, sinks)
    assert (out[: len(query)] - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    assert not out[len(query) :].any()


@pytest.mark.parametrize("library", libraries())
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_any_shapes(library: ctypes.CDLL, data: st.DataObject) -> None:
    kv_heads, group, head_dim = (data.draw(st.integers(1, most)) for most in (4, 9, 140))
    contexts = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    new = [data.draw(st.integers(1, context)) for context in contexts]
    kv, block_size = data.draw(st.sampled_from(TYPES)), data.draw(st.sampled_from([16, 32, 64]))
    window = data.draw(st.none() | st.integers(1, 160))
    softcap = data.draw(st.none() | st.floats(0.5, 50))
    query, cache, batch = step(contexts, new, kv_heads * group, kv_heads, head_dim, kv, block_size)
    sinks = torch.randn(kv_heads * group) if data.draw(st.booleans()) else None
    out = attention(library, query, cache, WindowedBatch(batch, window), head_dim**-0.5, softcap, sinks)
    expected = exact(query, cache, batch, window, softcap, sinks)
    assert (out - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("library", libraries())
def test_bfloat16_is_rounded_once(library: ctypes.CDLL) -> None:
    query, cache, batch = step([90, 130], [2, 100], 4, 2, 64, torch.bfloat16)
    query = query.bfloat16()
    out = attention(library, query, cache, WindowedBatch(batch, None), 0.125, None, None)
    wide = attention(library, query.float(), cache, WindowedBatch(batch, None), 0.125, None, None)
    assert out.equal(wide.bfloat16())


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("kv", [torch.float32, torch.int8])
@pytest.mark.parametrize("window", [None, 70])
def test_a_tokens_bits_are_its_own(library: ctypes.CDLL, kv: torch.dtype, window: int | None) -> None:
    """Prompts whole, cut anywhere, and token by token; alone and beside others."""
    query, cache, batch = step([150, 260, 40], [150, 260, 40], 6, 2, 48, kv)
    whole = attention(library, query, cache, WindowedBatch(batch, window), 0.2, None, None)
    for s, context in enumerate(batch.contexts.tolist()):
        mine = whole[batch.offsets[s] : batch.offsets[s + 1]]
        asked = query[batch.offsets[s] : batch.offsets[s + 1]]
        for cuts in ([0, 7, 64, 99, context], list(range(context + 1))):
            for begin, end in pairwise(cuts):
                begin, end = min(begin, context), min(end, context)
                if begin < end:
                    part = RaggedBatch(np.array([0, end - begin]), np.array([end]), batch.table[s : s + 1])
                    got = attention(library, asked[begin:end], cache, WindowedBatch(part, window), 0.2, None, None)
                    assert got.equal(mine[begin:end])


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("heads", [2, 8, 70])
def test_a_shared_prefix_changes_no_bit(library: ctypes.CDLL, kv: torch.dtype, heads: int) -> None:
    query, cache, batch = step([200, 131, 140, 90, 300], [1, 1, 5, 20, 1], heads, 2, 64, kv)
    for s in (1, 2, 3):
        batch.table[s, :4] = batch.table[0, :4]  # 64 positions
    batch.table[2, :8] = batch.table[1, :8]
    alone = attention(library, query, cache, WindowedBatch(batch, None), 0.125, None, None)
    for prefixes in (
        (SharedPrefix(0, 4, 64),),
        (SharedPrefix(1, 2, 128),),
        (SharedPrefix(0, 1, 64), SharedPrefix(1, 3, 64)),
    ):
        shared = WindowedBatch(replace(batch, prefixes=prefixes), None)
        assert attention(library, query, cache, shared, 0.125, None, None).equal(alone)


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(library: ctypes.CDLL, bad: float) -> None:
    query, cache, batch = step([70, 90], [1, 1], 4, 2, 32, torch.float32)
    fine = attention(library, query, cache, WindowedBatch(batch, None), 0.2, None, None)
    block = int(batch.table[0, 1])
    cache.key[block, 1, 3] = bad
    out = attention(library, query, cache, WindowedBatch(batch, None), 0.2, None, None)
    assert not out[0, 2:].isfinite().any()
    assert out[0, :2].equal(fine[0, :2]) and out[1].equal(fine[1])


@pytest.mark.parametrize("library", libraries()[:1])
def test_heads_that_are_too_large_are_refused(library: ctypes.CDLL) -> None:
    query, cache, batch = step([4], [1], 1, 1, MOST_HEAD_DIM + 16, torch.float32)
    with pytest.raises(ValueError, match=r"heads have 528 numbers; the kernel takes at most 512.*--cpu-path reference"):
        attention(library, query, cache, WindowedBatch(batch, None), 0.2, None, None)
