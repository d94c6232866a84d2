"""Ragged paged attention against plain torch in float64; in Triton's interpreter, or on a GPU (`TRITON_INTERPRET=0`).

The cache is filled with NaN where no sequence has written, and so are outputs and scratch memory before the kernels
run. The interpreter has no bfloat16 products, so queries are float32 and float16.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from batchinfer.engine.config import BLOCK_SIZES
from batchinfer.kernels import attention_merge_triton, attention_triton
from batchinfer.kernels.attention_plan import ITEM, AttentionPlan, Column, Tile, Tiling, plan_attention
from batchinfer.kernels.attention_triton import paged_attention, tiling
from batchinfer.kernels.gpu import INTERPRETED, Gpu
from batchinfer.kernels.kv_cache import KVCache
from batchinfer.kernels.ragged_attention import RaggedBatch, SharedPrefix, ragged_attention

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
SMALL = Tiling(few=Tile(16, 16), many=Tile(32, 32), same=Tile(16, 16), split=64, least=32)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
F8 = torch.float8_e4m3fn
# (context, new tokens): decoding, drafts, whole prompts and pieces of them.
MIXED = [(1, 1), (15, 15), (16, 1), (17, 9), (63, 40), (64, 2), (130, 1), (100, 5)]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*shape: Any, **kind: Any) -> Tensor:
        made = empty(*shape, **kind)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def case(
    rows: Sequence[tuple[int, int]],
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    kv: torch.dtype = torch.float32,
    query: torch.dtype = torch.float32,
    prefixes: tuple[SharedPrefix, ...] = (),
) -> tuple[Tensor, KVCache, RaggedBatch]:
    """Queries, a pool with the rows' keys and values in shuffled blocks, and the batch."""
    needed = [-(-context // block_size) for context, _ in rows]
    blocks = sum(needed) + 5
    order = iter(torch.randperm(blocks - 1).add(1).tolist())
    table = torch.zeros(len(rows), max(needed), dtype=torch.int32)  # padded with a block of nobody
    cache = _poisoned_pool(blocks, kv_heads, block_size, head_dim, kv)
    for s, (context, _) in enumerate(rows):
        table[s, : needed[s]] = torch.tensor([next(order) for _ in range(needed[s])])
        for prefix in prefixes:
            if prefix.first < s < prefix.first + prefix.count:
                table[s, : prefix.keys // block_size] = table[prefix.first, : prefix.keys // block_size]
        at = torch.arange(context)
        _write(cache, table[s].long()[at // block_size], at % block_size)
    offsets = np.cumsum([0, *(new for _, new in rows)])
    for name in ("key", "value", "key_scale", "value_scale"):
        tensor = getattr(cache, name)
        setattr(cache, name, None if tensor is None else tensor.to(DEVICE))
    batch = RaggedBatch(offsets, np.array([context for context, _ in rows]), table.to(DEVICE), prefixes)
    return torch.randn(int(offsets[-1]), heads, head_dim).to(DEVICE, query), cache, batch


def _poisoned_pool(blocks: int, kv_heads: int, block_size: int, head_dim: int, kv: torch.dtype) -> KVCache:
    cache = KVCache(blocks, kv_heads, block_size, head_dim, kv, values_by_column=True)
    for pool in (cache.key, cache.value):
        pool.copy_(torch.full(pool.shape, float("nan")).to(kv) if kv.is_floating_point else torch.tensor(-128))
    for scales in (cache.key_scale, cache.value_scale):
        if scales is not None:
            scales.fill_(float("nan"))
    return cache


def _write(cache: KVCache, block: Tensor, place: Tensor) -> None:
    for name in ("key", "value"):
        pool: Tensor = getattr(cache, name)
        new = torch.randn(len(block), pool.shape[1], pool.shape[3])
        scales: Tensor | None = getattr(cache, f"{name}_scale")
        if scales is not None:
            scales[block, :, place] = step = new.abs().amax(-1) / (127 if pool.dtype == torch.int8 else 448)
            new = new / step[..., None]
        pool[block, :, place] = new.round().to(pool.dtype) if pool.dtype == torch.int8 else new.to(pool.dtype)


def run(
    query: Tensor,
    cache: KVCache,
    batch: RaggedBatch,
    window: int | None = None,
    processors: int | None = 1,
    tiles: Tiling = SMALL,
) -> tuple[Tensor, AttentionPlan]:
    plan = plan_attention(batch, query.shape[1], cache.key.shape[1], window, tiles, processors)
    return paged_attention(query, cache, plan, query.shape[2] ** -0.5), plan


def check(
    found: Tensor,
    query: Tensor,
    cache: KVCache,
    batch: RaggedBatch,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    expected = ragged_attention(query.double(), cache, batch, query.shape[2] ** -0.5, window, softcap, sinks)
    tolerance = TOLERANCE[query.dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "block_size"), [(6, 2, 16), (5, 5, 8), (7, 1, 64)])
@pytest.mark.parametrize("processors", [1, 1000, None])
def test_mixed_batches(processors: int | None, heads: int, kv_heads: int, block_size: int, window: int | None) -> None:
    query, cache, batch = case(MIXED, heads, kv_heads, 16, block_size)
    found, plan = run(query, cache, batch, window, processors)
    assert (plan.partials > 0) == (len(plan.merged) > 0)
    assert window is not None or (plan.partials > 0) == (processors != 1)
    assert {tile for tile, _ in plan.launches} == ({SMALL.same} if processors is None else {SMALL.few, SMALL.many})
    check(found, query, cache, batch, window)


@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16, torch.float16, torch.int8, F8])
@pytest.mark.parametrize("query", [torch.float32, torch.float16])
@pytest.mark.parametrize("processors", [1, 1000])
def test_types(processors: int, query: torch.dtype, kv: torch.dtype) -> None:
    """Keys and values are what the cache says, to the last digit: 8 bits cost nothing here that the oracle does not."""
    x, cache, batch = case([(40, 1), (70, 12)], kv=kv, query=query)
    found, plan = run(x, cache, batch, processors=processors)
    assert found.dtype == query and (plan.partials > 0) == (processors > 1)
    check(found, x, cache, batch)


@pytest.mark.parametrize("kv", [torch.float32, torch.float16, torch.int8, F8])
@pytest.mark.parametrize("query", [torch.float32, torch.float16])
@pytest.mark.parametrize(("processors", "window"), [(1, None), (1000, None), (None, None), (1, 40)])
def test_sinks(processors: int | None, window: int | None, query: torch.dtype, kv: torch.dtype) -> None:
    """Some heads give nearly all weight to theirs, and some nearly none."""
    x, cache, batch = case(MIXED, kv=kv, query=query)
    plan = plan_attention(batch, x.shape[1], cache.key.shape[1], window, SMALL, processors)
    sinks = torch.linspace(-8, 8, x.shape[1])
    found = paged_attention(x, cache, plan, x.shape[2] ** -0.5, sinks_H=sinks)
    check(found, x, cache, batch, window, sinks=sinks)


@pytest.mark.parametrize("kv", [torch.float32, torch.float16, torch.int8, F8])
@pytest.mark.parametrize("query", [torch.float32, torch.float16])
@pytest.mark.parametrize(("processors", "window"), [(1, None), (1000, None), (None, None), (1, 40)])
def test_soft_caps(processors: int | None, window: int | None, query: torch.dtype, kv: torch.dtype) -> None:
    """Scores are about 1 in size, as is the cap, which bends nearly all of them."""
    x, cache, batch = case(MIXED, kv=kv, query=query)
    plan = plan_attention(batch, x.shape[1], cache.key.shape[1], window, SMALL, processors)
    check(paged_attention(x, cache, plan, x.shape[2] ** -0.5, 1.0), x, cache, batch, window, 1.0)


@pytest.mark.parametrize("kv", [torch.int8, F8])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_8_bits_in_blocks_of_every_size(block_size: int, kv: torch.dtype) -> None:
    """Their values lie by column, and blocks are smaller than a tile of keys, or larger."""
    x, cache, batch = case(
        [(40, 1), (150, 1), (70, 12)], head_dim=16, block_size=block_size, kv=kv, query=torch.float16
    )
    for processors, window in ((1, None), (1000, None), (None, 40)):
        check(run(x, cache, batch, window, processors)[0], x, cache, batch, window)


@pytest.mark.parametrize("kv", [torch.int8, F8])
def test_queries_beyond_float16_keep_their_bits(kv: torch.dtype) -> None:
    """Over 8-bit keys, bfloat16 is multiplied as float16; a power of two in a query changes no bit of its weights."""
    x, cache, batch = case([(40, 1), (70, 12)], kv=kv, query=torch.bfloat16)
    found, _ = run(x, cache, batch)
    check(found, x, cache, batch)
    assert cache.key_scale is not None
    for power in (2.0**60, 2.0**-30):
        cache.key_scale /= power
        assert run(x * power, cache, batch)[0].equal(found)
        cache.key_scale *= power


@pytest.mark.parametrize("kv", [torch.int8, F8])
def test_values_of_every_size_keep_their_digits(kv: torch.dtype) -> None:
    """The values' scales go into weights in float16, which has few digits left below 6e-5, and none above 65,504."""
    x, cache, batch = case([(200, 1), (70, 12)], head_dim=16, kv=kv, query=torch.bfloat16)
    clean, _ = run(x, cache, batch)
    check(clean, x, cache, batch)
    assert cache.value_scale is not None
    for power in (2.0**-10, 2.0**13):
        cache.value_scale *= power
        found = run(x, cache, batch)[0] / power
        assert (found - clean).double().norm() < 2e-3 * clean.double().norm()
        cache.value_scale /= power


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256, 512])
@pytest.mark.parametrize("group", [1, 8])
def test_heads_of_every_size_in_the_tiles_that_are_shipped(group: int, head_dim: int) -> None:
    query, cache, batch = case([(129, 1), (70, 33), (300, 3)], group, 1, head_dim, 32)
    found, plan = run(
        query,
        cache,
        batch,
        None,
        100,
        replace(tiling(head_dim, group, torch.float32, torch.float32, INTERPRETED), least=128),
    )
    assert len(plan.launches) == 2 and 0 < len(plan.merged) < len(query)
    check(found, query, cache, batch)


@pytest.mark.parametrize("new", range(1, 10))
def test_drafts_do_not_see_what_follows_them(new: int) -> None:
    query, cache, batch = case([(new, new), (64 + new, new), (63, new)], 3, 1, 16)
    check(run(query, cache, batch)[0], query, cache, batch)


def test_one_long_context_is_split_beside_short_ones() -> None:
    query, cache, batch = case([(20, 1), (400, 1), (20, 2)], 2, 1, 16)
    found, plan = run(query, cache, batch, None, 5)
    assert plan.merged.tolist() == [1] and plan.partials == int(plan.first[2]) > 4
    check(found, query, cache, batch)


def alone(batch: RaggedBatch, s: int, token: int) -> RaggedBatch:
    """One token of a sequence, as if it were decoded."""
    new = int(batch.offsets[s + 1] - batch.offsets[s])
    return RaggedBatch(np.array([0, 1]), batch.contexts[s : s + 1] - new + token + 1, batch.table[s : s + 1])


@pytest.mark.usefixtures("fixed_products")
@pytest.mark.parametrize("window", [None, 50])
def test_fixed_bits(window: int | None) -> None:
    """A token has the same bits in any batch, as a draft or on its own, and with a prefix or without."""
    rows = [(130, 1), (100, 9), (110, 20), (3, 1)]
    prefixes = () if window else (SharedPrefix(0, 3, 80),)
    query, cache, batch = case(rows, 6, 2, 16, prefixes=prefixes)
    found, plan = run(query, cache, batch, window, None)
    assert len(plan.launches) == 1 and len(plan.merged)
    plain, plain_plan = run(query, cache, replace(batch, prefixes=()), window, None)
    assert found.equal(plain) and (bool(prefixes) == (len(plan.launches[0][1]) != len(plain_plan.launches[0][1])))
    for s, (_, new) in enumerate(rows):
        for token in {0, new - 1}:
            row = int(batch.offsets[s]) + token
            single, _ = run(query[row : row + 1], cache, alone(batch, s, token), window, None)
            assert single[0].equal(found[row]), (s, token)


@pytest.mark.parametrize(("processors", "kv"), [(1, torch.int8), (1000, torch.float32), (None, torch.float32)])
def test_shared_prefixes(processors: int | None, kv: torch.dtype) -> None:
    rows = [(90, 1), (96, 4), (81, 1), (10, 2), (70, 1), (75, 9), (100, 12), (64, 1)]
    prefixes = (SharedPrefix(0, 3, 72), SharedPrefix(4, 3, 64))  # one ends within a tile of keys
    query, cache, batch = case(rows, head_dim=16, block_size=8, kv=kv, prefixes=prefixes)
    found, plan = run(query, cache, batch, None, processors)
    _, plain = run(query, cache, replace(batch, prefixes=()), None, processors)
    assert keys_read(plan) < keys_read(plain)
    shared = [row for p in prefixes for row in range(batch.offsets[p.first], batch.offsets[p.first + p.count])]
    assert set(shared) <= set(plan.merged.tolist())
    check(found, query, cache, batch)


def keys_read(plan: AttentionPlan) -> int:
    return sum(int((items[:, Column.END] - items[:, Column.START]).sum()) for _, items in plan.launches)


def test_keys_before_a_window_are_not_loaded() -> None:
    query, cache, batch = case([(150, 1), (150, 3)], 2, 1, 16, 8)
    for s, new in ((0, 1), (1, 3)):
        before = 150 - new + 1 - 20
        blocks = batch.table[s, : before // 8 + 1].long()
        for pool in (cache.key, cache.value):
            pool[blocks[:-1]] = pool[blocks[-1], :, : before % 8] = float("nan")
    found, plan = run(query, cache, batch, 20)
    assert found.isfinite().all()
    assert sorted(items[0, Column.START].item() for items in plan.launches[0][1].split(1)) == [128, 130]
    cache.key, cache.value = cache.key.nan_to_num(), cache.value.nan_to_num()
    check(found, query, cache, batch, 20)


def test_a_row_that_is_not_finite_stays_alone() -> None:
    query, cache, batch = case([(100, 1), (100, 4), (100, 1)], 2, 1, 16)
    clean, _ = run(query, cache, batch, None, 1000)
    query[2, 1, 5] = float("nan")
    found, plan = run(query, cache, batch, None, 1000)
    assert plan.partials and found[2, 1].isnan().all()
    found[2, 1] = clean[2, 1]
    assert found.equal(clean)


def test_padding_of_a_step_gets_zeros() -> None:
    query, cache, batch = case([(10, 2)], 2, 1, 16)
    found, _ = run(torch.cat([query, query.new_full((3, 2, 16), float("nan"))]), cache, batch)
    assert found[2:].eq(0).all()
    check(found[:2], query, cache, batch)


def test_partials_without_keys_weigh_nothing() -> None:
    partial, lse = torch.randn(5, 1, 16, device=DEVICE), torch.randn(5, 1, device=DEVICE)
    lse[[0, 2, 4]] = float("-inf")
    first = torch.tensor([0, 3, 4, 5], dtype=torch.int32, device=DEVICE)
    merged = torch.tensor([0, 2], dtype=torch.int32, device=DEVICE)
    out = torch.empty(3, 1, 16, device=DEVICE)
    attention_merge_triton.merge_partials(partial, lse, first, merged, out)
    assert out[0].equal(partial[1]) and out[1].isnan().all() and out[2].eq(0).all()


def test_what_cannot_be_planned_is_refused() -> None:
    _, _, batch = case([(90, 1), (90, 9)], prefixes=(SharedPrefix(0, 2, 80),))
    with pytest.raises(ValueError, match="a window of 8 and a shared prefix"):
        plan_attention(batch, 2, 1, 8, SMALL, 1)
    with pytest.raises(ValueError, match="has 96 keys, but a sequence's new tokens begin at 81"):
        plan_attention(replace(batch, prefixes=(SharedPrefix(0, 2, 96),)), 2, 1, None, SMALL, 1)
    with pytest.raises(ValueError, match="17 query heads share a key head, but a tile has 16 rows"):
        plan_attention(batch, 17, 1, None, SMALL, 1)


@pytest.mark.parametrize("group", [1, 7, 71])
def test_every_group_of_heads_fits_the_tiles_that_are_shipped(group: int) -> None:
    small = Gpu("a small GPU", (8, 9), 58, 99 << 10)
    shapes = itertools.product((64, 256, 512), (torch.bfloat16, torch.int8), (INTERPRETED, small))
    for head_dim, kv, gpu in shapes:
        tiles = tiling(head_dim, group, torch.bfloat16, kv, gpu)
        for tile in (tiles.few, tiles.many, tiles.same):
            assert tile.keys >= 16, "matrix units take no fewer"
            assert tile.rows >= group and tile.rows.bit_count() == tile.keys.bit_count() == 1
            assert tiles.split % tile.keys == 0


@pytest.mark.parametrize(
    ("sequences", "context", "fill"), [(64, 4096, 0.94), (16, 8192, 0.96), (1, 32768, 0.94), (1, 8192, 0.86)]
)
def test_items_fill_the_gpu(sequences: int, context: int, fill: float) -> None:
    """Llama-3-8B's heads on 132 multiprocessors: the share of time in which they work, if every wave lasts as long as
    the longest item."""
    tiles = tiling(128, 4, torch.bfloat16, torch.bfloat16, Gpu("a GPU", (9, 0), 132, 227 << 10))
    table = torch.zeros(sequences, context // 32, dtype=torch.int32)
    batch = RaggedBatch(np.arange(sequences + 1), np.full(sequences, context), table)
    ((tile, items),) = plan_attention(batch, 32, 8, None, tiles, 132).launches
    assert tile == tiles.few and tile.resident > 1
    keys = (items[:, Column.END] - items[:, Column.START]).double()
    waves = -(-len(items) * 8 // (132 * tile.resident))
    assert keys.sum() * 8 / (waves * 132 * tile.resident * keys.max()) > fill


def test_items_cover_every_key_of_every_token_once() -> None:
    rng = np.random.default_rng(0)
    for processors in (1, 7, 1000, None):
        new = rng.integers(1, 40, 12)
        contexts = 64 + new + rng.integers(0, 500, 12)
        table = torch.arange(12 * 40, dtype=torch.int32).view(12, 40)
        table[2:6, :4] = table[2, :4]
        batch = RaggedBatch(np.cumsum([0, *new]), contexts, table, (SharedPrefix(2, 4, 64),))
        plan = plan_attention(batch, 6, 2, None, SMALL, processors)
        keys: dict[int, list[int]] = {row: [] for row in range(plan.tokens)}
        partials: dict[int, list[int]] = {row: [] for row in range(plan.tokens)}
        for tile, items in plan.launches:
            assert items.shape[1] == ITEM and (items[:, Column.COUNT] * 3 <= tile.rows).all()
            for row, count, _, start, end, position, partial, _ in items.tolist():
                for i in range(count):
                    keys[row + i] += range(start, min(end, position + i + 1))
                    partials[row + i].append(partial)
        positions = np.concatenate([np.arange(c - n, c) for c, n in zip(contexts, new, strict=True)])
        assert all(sorted(keys[row]) == list(range(position + 1)) for row, position in enumerate(positions))
        counts = plan.first.diff().tolist()
        assert all(sorted(p) == ([-1] if len(p) == 1 else list(range(counts[row]))) for row, p in partials.items())
        assert plan.merged.tolist() == [row for row, p in partials.items() if len(p) > 1]
        assert plan.partials == sum(counts)


def test_what_is_shipped_names_every_argument() -> None:
    found = [*attention_triton.shipped(INTERPRETED), *attention_merge_triton.shipped(INTERPRETED)]
    assert len({kernel.name for kernel in found}) == len(found)
    for kernel in found:
        assert [*kernel.types, *kernel.constants] == kernel.kernel.arg_names
