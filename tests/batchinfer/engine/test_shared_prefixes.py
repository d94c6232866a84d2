"""Which sequences read a prefix together on a GPU, what that saves, and that no row becomes another by it."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import TINY, engine_of, tokens

from batchinfer.engine.admission import Admission
from batchinfer.engine.attention_inputs import RaggedInputs
from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.config import Speculation
from batchinfer.engine.engine import Engine
from batchinfer.engine.output_lengths import LEAST_ENDED, OutputLengths
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.sequence import SequenceTable
from batchinfer.engine.shared_prefixes import KEYS_A_PARTIAL, SharedPrefixes
from batchinfer.kernels import attention_triton
from batchinfer.kernels.attention_plan import AttentionPlan, Column, Tile, Tiling, plan_attention
from batchinfer.kernels.attention_shape import AttentionShape
from batchinfer.kernels.grain import TILE
from batchinfer.kernels.ragged import Ints
from batchinfer.kernels.ragged_attention import RaggedBatch, SharedPrefix
from batchinfer.models.batch import Batch

HEADS, KV_HEADS = 32, 8
SHAPE = AttentionShape(None, HEADS, KV_HEADS, 128)
# A tile takes 4 tokens of 4 query heads each, or 32.
TILING = Tiling(few=Tile(16, 64), many=Tile(128, 64), same=Tile(64, 32))


def text(rng: np.random.Generator, length: int) -> list[int]:
    ids: list[int] = rng.integers(2, 320, length).tolist()
    return ids


def scheduler_of(sequences: int, budget: int = 8192) -> tuple[Scheduler, RaggedInputs]:
    """A scheduler as on a GPU; no model is needed to see what it would read."""
    table = SequenceTable(sequences, 1280, 32)
    manager = BlockManager(sequences * 40 + 100)
    inputs = RaggedInputs({SHAPE: TILING}, 132)
    return Scheduler(table, manager, Admission(table, manager, True, None), inputs, budget, 1, 8, np.array([1])), inputs


def steps(scheduler: Scheduler) -> Iterator[tuple[Batch, AttentionPlan]]:
    """Yield each step until no row is left; every sampled token is token 5."""
    table = scheduler.table
    while (batch := scheduler.schedule()) is not None:
        plan = batch.attention[SHAPE]
        assert isinstance(plan, AttentionPlan)
        yield batch, plan
        scheduler.update(batch, np.full(len(batch.sequences), 5))
        for place in batch.sequences.tolist():
            if table.length[place] >= table.end[place]:
                scheduler.finish(place)


def keys_of(plan: AttentionPlan) -> int:
    items = torch.cat([items for _, items in plan.launches])
    return int((items[:, Column.END] - items[:, Column.START]).sum())


def test_a_table_with_a_template_reads_as_little_as_arithmetic_says() -> None:
    """256 rows of 600 tokens of template, 400 of their own and 128 new ones.

    9 tiles of 64 positions are shared, and 256 new tokens take 8 tiles of queries, which read them 8 times a step.
    """
    rng = np.random.default_rng(0)
    template = text(rng, 600)
    prompts = [template + text(rng, 400) for _ in range(256)]
    scheduler, _ = scheduler_of(256, budget=256 * 1000)
    scheduler.add(Requests.of(prompts, SamplingParams(max_tokens=128, ignore_eos=True)))
    found = [
        (batch.query_tokens, plan.keys_read, plan.keys_unshared, keys_of(plan)) for batch, plan in steps(scheduler)
    ]
    assert len(found) == 128 and all(read == by_items for _, read, _, by_items in found)
    assert found[0][:1] == (0,) and found[0][1] == found[0][2], "prompts fill tiles by themselves and share nothing"
    contexts = range(1001, 1128)  # of the tokens that are decoded: the prompt's end samples the first of the 128
    assert found[1:] == [(256, 256 * c - 248 * 576, 256 * c, 256 * c - 248 * 576) for c in contexts]
    read, unshared = (sum(step[i] for step in found[1:]) for i in (1, 2))
    assert unshared - read == 127 * 248 * 576
    assert f"{read / unshared:.4f}" == f"{1 - 576 * (1 - 8 / 256) / 1064:.4f}" == "0.4756"
    steps_of_all = [sum(step[i] for step in found) for i in (1, 2)]
    assert steps_of_all[1] - steps_of_all[0] == unshared - read


def test_groups_stay_together_where_places_are_taken_again() -> None:
    """Rows of three templates end at any time, and later rows take their places: neighbours still begin alike."""
    rng = np.random.default_rng(1)
    templates = [text(rng, length) for length in (300, 200, 520)]
    which = np.repeat([0, 1, 2], [40, 25, 35])
    prompts = [templates[t] + text(rng, int(rng.integers(1, 60))) for t in which]
    plain = Requests.of(prompts, SamplingParams())
    lengths = rng.integers(2, 60, len(prompts))
    params = SamplingTable.of([SamplingParams(max_tokens=n, ignore_eos=True) for n in range(1, 60)])
    scheduler, _ = scheduler_of(16, budget=512)
    scheduler.add(replace(plain, params=params, param_index=lengths.astype(np.int32) - 1))
    sorted_places, decoding_steps = 0, 0
    for batch, plan in steps(scheduler):
        if batch.prompt_tokens:
            continue
        decoding_steps += 1
        places = batch.queries.places
        sorted_places += bool((np.diff(places) > 0).all())
        members = Counter(which[scheduler.table.row[places]].tolist())
        # 4 tokens of a group fit in the small tile, any more of these 16 in the large one.
        saved = sum((n - 1) * (len(templates[t]) // TILE * TILE) for t, n in members.items())
        assert plan.keys_unshared - plan.keys_read == saved == plan.keys_unshared - keys_of(plan)
    assert decoding_steps > 50 and sorted_places < decoding_steps / 2


def test_every_group_reads_its_own_blocks_where_rows_are_preempted_and_steps_withdrawn() -> None:
    """Rows that are computed again own their whole prompt, and twins have the tiles of their prompt."""
    rng = np.random.default_rng(3)
    template = text(rng, 140)
    prompts = [template + text(rng, int(n)) for n in rng.integers(1, 100, 30)]
    prompts = [p for prompt in prompts for p in [prompt] * int(rng.integers(1, 3))]
    table, manager = SequenceTable(12, 512, 32), BlockManager(60)
    lengths = OutputLengths(512)
    for _ in range(LEAST_ENDED):
        lengths.observe(-1, 2)
    inputs = RaggedInputs({SHAPE: TILING}, 132)
    admission = Admission(table, manager, True, lengths)
    scheduler = Scheduler(table, manager, admission, inputs, 256, 1, 8, np.array([1]))
    scheduler.add(Requests.of(prompts, SamplingParams(max_tokens=80, ignore_eos=True)))
    kinds = Counter[str]()
    for step, (batch, plan) in enumerate(steps(scheduler)):
        places = np.concatenate([[c.place for c in batch.chunks], batch.queries.places]).astype(np.int64)
        first_new = np.concatenate([[c.start for c in batch.chunks], batch.queries.first])
        for p in inputs.batches.prefixes[SHAPE]._prefixes:
            members = slice(p.first, p.first + p.count)
            blocks = plan.table[members, : p.keys // 32]
            assert p.count > 1 and (blocks == blocks[:1]).all() and (first_new[members] >= p.keys).all()
            assert len(set(places[members].tolist())) == p.count
            kinds["beside prompts"] += bool(batch.chunks) and p.first >= len(batch.chunks)
            kinds["recomputed beside it"] += bool((table.own_from[batch.queries.places] == 0).any())
        if step % 7 == 0:
            scheduler.withdraw(batch)
            again = scheduler.schedule()
            assert again is not None and again.slots.equal(batch.slots)
    assert admission.preemptions > 0
    assert len(kinds) == 2 and min(kinds.values()) > 0, kinds


def test_steps_of_the_same_rows_are_grouped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    template = text(rng, 130)
    scheduler, inputs = scheduler_of(8)
    grouped = 0
    choose = inputs.batches.prefixes[SHAPE]._choose

    def counting(*args: Any) -> tuple[SharedPrefix, ...]:
        nonlocal grouped
        grouped += 1
        return choose(*args)

    monkeypatch.setattr(inputs.batches.prefixes[SHAPE], "_choose", counting)
    params = SamplingTable.of([SamplingParams(max_tokens=n, ignore_eos=True) for n in (30, 50)])
    plain = Requests.of([template + text(rng, 9) for _ in range(8)], params[0])
    scheduler.add(replace(plain, params=params, param_index=np.arange(8, dtype=np.int32) % 2))
    decoding_steps = sum(not batch.prompt_tokens for batch, _ in steps(scheduler))
    assert decoding_steps == 49 and grouped == 3, "the prompts, then all rows, then those that are left"


@pytest.mark.parametrize("seed", range(20))
def test_of_nested_prefixes_those_are_chosen_that_save_the_most(seed: int) -> None:
    """Beside every choice there is, as the planner counts what is read; with fixed bits, partials cost nothing."""
    rng = np.random.default_rng(seed)
    tiling, group, n = (
        Tiling(few=Tile(4, 16), many=Tile(8, 16), same=Tile(int(rng.choice([4, 8, 32])), 16), split=64),
        2,
        8,
    )
    tiles = np.concatenate([[0], rng.integers(0, 5, n - 1)])  # in common with the sequence before
    lengths = rng.integers(1, 4, n)
    contexts = 5 * TILE + lengths
    batch = RaggedBatch(np.cumsum([0, *lengths]), contexts, torch.zeros(n, 30, dtype=torch.int32))

    def reads(prefixes: tuple[SharedPrefix, ...]) -> int:
        return plan_attention(replace(batch, prefixes=prefixes), group, 1, None, tiling, None).keys_read

    chosen = SharedPrefixes.on_gpu(group, tiling, fixed=True)._choose(tiles, lengths)
    assert reads(chosen) == min(map(reads, every_choice(tiles, 0, n)))
    for p in chosen:
        assert p.count > 1 and p.keys <= TILE * tiles[p.first + 1 : p.first + p.count].min()


def every_choice(tiles: Ints, begin: int, end: int) -> list[tuple[SharedPrefix, ...]]:
    """Return each way to share among the sequences [begin, end): all together, or as their branches choose."""
    if end - begin < 2:
        return [()]
    common = int(tiles[begin + 1 : end].min())
    cuts = [begin, *(i for i in range(begin + 1, end) if tiles[i] == common), end]
    choices: list[tuple[SharedPrefix, ...]] = [()]
    for a, b in pairwise(cuts):
        choices = [left + right for left in choices for right in every_choice(tiles, a, b)]
    return choices + ([(SharedPrefix(begin, end - begin, common * TILE),)] if common else [])


def test_a_prefix_that_saves_less_than_its_partial_results_cost_is_not_shared() -> None:
    """Of prompts of a template and a few tokens more, and of prompts that go on for long."""
    prefixes = SharedPrefixes.on_gpu(4, TILING, fixed=False)
    tiles = np.array([0, *[3] * 9])
    cost = 2 * KEYS_A_PARTIAL * 4  # a token
    assert prefixes._choose(tiles, np.full(10, 1)) == (SharedPrefix(0, 10, 192),)
    # 7 tokens take a large tile each, 70 three of them; 31 take one each, and 310 still take 10.
    assert 70 * cost < 192 * (10 - 3) and prefixes._choose(tiles, np.full(10, 7)) == (SharedPrefix(0, 10, 192),)
    assert prefixes._choose(tiles, np.full(10, 31)) == ()
    # One long chunk among single tokens stays by itself.
    alone = np.array([1] * 5 + [300] + [1] * 4)
    assert prefixes._choose(tiles, alone) == (SharedPrefix(0, 5, 192), SharedPrefix(6, 4, 192))


SMALL = {"max_model_len": 192, "max_num_batched_tokens": 128, "max_num_seqs": 8, "kv_cache_tokens": 2048}


def groups_of(engine: Engine) -> list[tuple[int, tuple[SharedPrefix, ...]]]:
    """Return a list that grows by (new tokens, prefixes that are read together) with each step."""
    inputs = engine.scheduler.attention
    assert isinstance(inputs, RaggedInputs)
    (prefixes,) = inputs.batches.prefixes.values()
    of, found = prefixes.of, list[tuple[int, tuple[SharedPrefix, ...]]]()

    def seen(table: SequenceTable, places: Ints, lengths: Ints, contexts: Ints) -> tuple[SharedPrefix, ...]:
        found.append((int(lengths.sum()), of(table, places, lengths, contexts)))
        return found[-1][1]

    prefixes.of = seen  # type: ignore[method-assign]
    return found


def family(rng: np.random.Generator) -> list[list[int]]:
    """In depth-first order: a template with twins on a branch of it, a prompt of nobody's, and another template."""
    template, other = text(rng, 64), text(rng, 64)
    twin = template + text(rng, 64 + 3)
    return [twin, twin, [*twin[:128], 5], [*template, 6], [7, 8], [*other, 9], [*other, 10, 11]]


@pytest.mark.long(minutes=1)
@pytest.mark.parametrize(
    "settings", [{}, {"block_size": 16, "speculation": Speculation("ngram", gate=False)}, {"deterministic": True}]
)
def test_rows_are_the_same_with_prefixes_read_together_and_apart(
    make_model: Callable[..., Path],
    interpreted: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    """Branches, twins, prompts beside rows that decode, rows that end before others; a window in every other layer."""
    split_at(monkeypatch, 64)
    model = make_model("qwen2", **TINY, use_sliding_window=True, sliding_window=40, max_window_layers=1)
    prompts = family(np.random.default_rng(0))
    params = SamplingTable.of([SamplingParams(max_tokens=n, temperature=0.7, ignore_eos=True) for n in (2, 5)])
    plain = Requests.of(prompts, params[0], seeds=range(len(prompts)))
    requests = replace(plain, params=params, param_index=np.array([1, 0, 1, 1, 0, 1, 1], np.int32))
    engine = interpreted(model, **{**SMALL, **settings})
    found = groups_of(engine)
    assert tokens(engine, requests) == tokens(engine_of(model), requests)
    groups = [p for _, prefixes in found for p in prefixes]
    assert {p.keys for p in groups} == {64, 128}, "the branch's and a template's"
    assert any(len(prefixes) > 1 for _, prefixes in found), "two groups in a step"
    assert any(prefixes and new > 64 for new, prefixes in found), "a group beside a prompt"
    stats = engine.stats()
    assert 0 < stats.kv_bytes_read < stats.kv_bytes_unshared

    monkeypatch.setattr(SharedPrefixes, "_choose", lambda *_: ())
    engine = interpreted(model, **{**SMALL, **settings})
    assert tokens(engine, requests) == tokens(engine_of(model), requests)
    assert engine.stats().kv_bytes_read == engine.stats().kv_bytes_unshared == stats.kv_bytes_unshared


@pytest.mark.long(minutes=1)
@pytest.mark.usefixtures("fixed_products")
def test_deterministic_rows_have_the_same_bits_alone_and_in_a_group(
    make_model: Callable[..., Path], interpreted: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    split_at(monkeypatch, 64)
    model = make_model("llama", **{**TINY, "num_hidden_layers": 1})
    template = text(np.random.default_rng(0), 66)
    prompts = [[*template, 5], [*template, 6, 7], [*template, 8]]

    def logits(rows: list[list[int]]) -> tuple[list[list[bytes]], list[SharedPrefix]]:
        engine = interpreted(model, **SMALL, deterministic=True, speculation=Speculation("off"))
        steps = groups_of(engine)
        engine.add(Requests.of(rows, SamplingParams(max_tokens=3, ignore_eos=True)))
        found: list[list[bytes]] = [[] for _ in rows]
        while (batch := engine.scheduler.schedule()) is not None:
            of_step = engine.runner.logits(batch)[: len(batch.sequences)]
            for row, bits in zip(engine.table.row[batch.sequences].tolist(), of_step.numpy(), strict=True):
                found[row].append(bits.tobytes())
            engine.scheduler.update(batch, of_step.argmax(-1).numpy())
            for place in batch.sequences.tolist():
                if engine.table.length[place] == engine.table.end[place]:
                    engine.scheduler.finish(place)
        return found, [p for _, prefixes in steps for p in prefixes]

    together, groups = logits(prompts)
    # The ends of two prompts, behind the chunk that computes the template; then both steps that decode.
    assert groups == [SharedPrefix(1, 2, 64), *[SharedPrefix(0, 3, 64)] * 2]
    for row, prompt in enumerate(prompts):
        [alone], none = logits([prompt])
        assert alone == together[row] and len(alone) == 3 and not none


def split_at(monkeypatch: pytest.MonkeyPatch, keys: int) -> None:
    """Let the keys of deterministic attention be split on a grid that is fine enough for short prompts."""
    tiling = attention_triton.tiling

    def finer(*shape: Any) -> Tiling:
        return replace(tiling(*shape), split=keys)

    monkeypatch.setattr(attention_triton, "tiling", finer)
