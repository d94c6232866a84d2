"""Prompts that begin alike are computed once, whatever the order, and every row has its own result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled import paths
from engines import IdsAsText, assert_blocks_are_free, engine_of, prompts_of, run, tokens

from batchinfer.engine.block_manager import BlockManager
from batchinfer.engine.config import Speculation
from batchinfer.engine.prefix_tree import PrefixTree, likeness
from batchinfer.engine.request import FinishReason, Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.kernels.attention import TILE


def tree_of_prompts(seed: int = 0) -> list[list[int]]:
    """In depth-first order: three templates, two with a second level, and prompts of nobody's."""
    rng = np.random.default_rng(seed)

    def text(n: int) -> list[int]:
        return rng.integers(2, 320, n).tolist()

    prompts: list[list[int]] = []
    for length, branches in ((130, 2), (64, 3), (200, 0)):
        template = text(length)
        prompts += [template + text(int(rng.integers(1, 40))) for _ in range(5)]
        for _ in range(branches):
            branch = template[: length // TILE * TILE] + text(70)
            prompts += [branch + text(int(rng.integers(1, 90))) for _ in range(4)]
        prompts += [text(int(rng.integers(1, 150)))]
    return [*prompts, prompts[-1], prompts[0][:TILE], prompts[0][: TILE + 1]]


@pytest.mark.parametrize(("dtype", "quantization"), [("float32", "none"), ("bfloat16", "w8a8-int8")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 64}, {"max_num_seqs": 3}, {"max_num_batched_tokens": 100, "block_size": 16}],
)
def test_rows_are_the_same_with_shared_prefixes_and_without(
    make_model: Callable[..., Path], dtype: str, quantization: str, temperature: float, settings: dict[str, Any]
) -> None:
    model = make_model("mistral", sliding_window=100)
    params = SamplingParams(max_tokens=12, temperature=temperature, ignore_eos=True, top_p=0.95)
    prompts = tree_of_prompts()
    requests = Requests.of(prompts, params, seeds=range(100, 100 + len(prompts)))
    common = {"dtype": dtype, "quantization": quantization}
    alone = tokens(engine_of(model, **common, prefix_sharing=False), requests)
    engine = engine_of(model, **common, **settings)
    assert tokens(engine, requests) == alone
    stats = engine.stats()
    alike = likeness(requests)
    assert stats.shared_tokens >= TILE * int(alike.tiles.sum()) > 1000
    assert stats.prompt_tokens == len(requests.token_ids) - stats.shared_tokens


needs_c = pytest.mark.skipif(not paths(), reason="no kernels in C run here")
BY_BLOCK = {"block_size": 16, "prefix_grain": 16}


@needs_c
@pytest.mark.parametrize(
    ("model_type", "quantization", "settings"),
    [
        ("llama", "none", {"max_num_batched_tokens": 100, "max_num_seqs": 3}),
        ("llama", "w8a8-int8", {"kv_cache_dtype": "int8"}),
        ("mistral", "w8a8-int8", {}),
        ("gemma3_text", "none", {"kv_cache_dtype": "int8"}),
    ],
)
def test_beginnings_are_shared_by_block(
    make_model: Callable[..., Path], model_type: str, quantization: str, settings: dict[str, Any]
) -> None:
    """Neighbours compute all whole blocks that they have in common once; no row changes."""
    model, rng = make_model(model_type), np.random.default_rng(1)
    heads = [rng.integers(2, 320, n).tolist() for n in (15, 16, 17, 40, 63, 130)]
    prompts = [head + rng.integers(2, 320, int(rng.integers(1, 50))).tolist() for head in heads for _ in range(5)]
    requests = Requests.of(prompts, SamplingParams(max_tokens=10, temperature=0.7, ignore_eos=True), seeds=range(30))
    common = {"quantization": quantization, "kv_cache_dtype": settings.get("kv_cache_dtype", "auto")}
    alone = tokens(engine_of(model, prefix_sharing=False, **common), requests)
    engine = engine_of(model, **BY_BLOCK, **(common | settings))
    assert tokens(engine, requests) == alone
    assert engine.stats().shared_tokens >= sum(4 * (len(head) // 16 * 16) for head in heads) > 0
    assert_blocks_are_free(engine)


@needs_c
def test_twins_and_drafts_behind_a_beginning_shared_by_block(make_model: Callable[..., Path]) -> None:
    model, rng = make_model("llama"), np.random.default_rng(2)
    head = rng.integers(2, 40, 50).tolist()
    prompts = [*[head] * 4, *[head + [7, 8, 9] * n for n in range(1, 6)], *[[*head, 5]] * 3]
    requests = Requests.of(prompts, SamplingParams(max_tokens=30, ignore_eos=True), seeds=range(len(prompts)))
    alone = tokens(engine_of(model, prefix_sharing=False, speculation=Speculation("off")), requests)
    for settings in ({}, {"speculation": Speculation("ngram", gate=False)}, {"max_num_seqs": 2}):
        assert tokens(engine_of(model, **BY_BLOCK, **settings), requests) == alone


def test_a_grain_that_cuts_blocks_is_refused(make_model: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="prefix_grain is 16; it must be a multiple of the block size, 32"):
        engine_of(make_model("llama"), prefix_grain=16)


def test_the_reference_shares_tiles_alone(make_model: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="prefix_grain is 16; without kernels in C it must be 64"):
        engine_of(make_model("llama"), cpu_path="reference", **BY_BLOCK)


def test_any_order_gives_the_same_rows(make_model: Callable[..., Path]) -> None:
    model = make_model("llama")
    requests = Requests.of(tree_of_prompts(), SamplingParams(max_tokens=8, ignore_eos=True))
    expected = tokens(engine_of(model), requests)
    for seed in range(3):
        shuffled = requests.take(np.random.default_rng(seed).permutation(len(requests)))
        assert tokens(engine_of(model, max_num_seqs=4), shuffled) == expected


def test_tiles_are_shared_only_before_the_last_one_and_only_if_all_tokens_agree() -> None:
    a = list(range(2, 2 + 3 * TILE))
    prompts = [a, a, [*a, 1], a[:TILE], a[: TILE + 1], [1, *a[1:]], [1, *a[1 : 2 * TILE - 1], 7, 8], a[:5]]
    alike = likeness(Requests.of(prompts, SamplingParams()))
    assert alike.tiles.tolist() == [0, 2, 2, 0, 0, 0, 1, 0]
    assert alike.twins.tolist() == [False, True, *[False] * 6]


@pytest.mark.parametrize("length", [1, 30, TILE - 1, TILE, TILE + 1, 200])
@pytest.mark.parametrize(
    "settings",
    [{}, {"kv_cache_dtype": "int8"}, {"max_num_batched_tokens": 64}, {"max_num_seqs": 3}, {"block_size": 16}],
)
def test_twins_compute_one_prompt_and_draw_each_their_own(
    make_model: Callable[..., Path], length: int, settings: dict[str, Any]
) -> None:
    rng = np.random.default_rng(length)
    before, same, after = (rng.integers(2, 320, n).tolist() for n in (length + 40, length, 77))
    params = SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True)
    requests = Requests.of([before, *[same] * 8, after], params, seeds=range(10))
    model = make_model("llama")
    common = {"kv_cache_dtype": settings.get("kv_cache_dtype", "auto")}
    alone = tokens(engine_of(model, prefix_sharing=False, **common), requests)
    engine = engine_of(model, **settings)
    assert tokens(engine, requests) == alone
    assert len({tuple(alone[row]) for row in range(1, 9)}) > 4
    if "max_num_seqs" not in settings:  # else the first have ended their prompt before the last begin
        assert engine.stats().prompt_tokens == len(before) + length + len(after)
        assert engine.stats().shared_tokens == 7 * length
    assert_blocks_are_free(engine)


def test_twins_of_a_row_that_is_not_finite_fail_like_it(make_model: Callable[..., Path]) -> None:
    engine = engine_of(make_model("llama"), max_num_seqs=4, kv_cache_tokens=1024)
    engine.runner.decoder.embedding[7] = float("nan")
    params = SamplingParams(max_tokens=6, temperature=1.0, ignore_eos=True)
    found = run(engine, Requests.of([[5, 7, 9]] * 3 + [[5, 8, 9]] * 9, params, seeds=range(12)))
    assert [found[row][1] for row in range(12)] == [FinishReason.ERROR] * 3 + [FinishReason.LENGTH] * 9


def test_twins_whose_step_was_withdrawn_are_computed_in_the_next(make_model: Callable[..., Path]) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.0, ignore_eos=True)
    requests = Requests.of([[5, 6] * 50] * 4, params, seeds=range(4))
    model = make_model("llama")
    expected = tokens(engine_of(model), requests)
    engine = engine_of(model)
    engine.add(requests)
    for _ in range(2):
        batch = engine.scheduler.schedule()
        assert batch is not None and batch.chunks[0].twins == (1, 2, 3)
        engine.scheduler.withdraw(batch)
    assert tokens(engine, requests.take(np.arange(0))) == expected


def test_shared_blocks_are_freed_right_after_the_last_row_that_needs_them(make_model: Callable[..., Path]) -> None:
    """More than a pool of rows with one prefix, then many with another: only one prefix has room."""
    rng = np.random.default_rng(3)
    long = [rng.integers(2, 320, 320).tolist() for _ in range(4)]
    prompts = [[*template, k, k + 1] for template in long for k in range(2, 12)]
    requests = Requests.of(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
    engine = engine_of(make_model("llama"), kv_cache_tokens=512 + 64, max_num_seqs=3)
    most = 0
    engine.add(requests)
    while engine.unfinished:
        engine.step()
        most = max(most, int((~engine.scheduler.manager._free[1:]).sum()))
    assert_blocks_are_free(engine)
    assert engine.stats().prompt_tokens == 4 * 322 + 36 * 2
    assert most <= (320 // 32) + 3 * 1 + (320 // 32), "two templates at most, and the rows' own blocks"


def test_a_prefix_that_is_not_finite_fails_its_rows_and_spoils_no_other(make_model: Callable[..., Path]) -> None:
    model = make_model("llama")
    clean = [[t if t != 7 else 8 for t in prompt] for prompt in tree_of_prompts()]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    expected = {
        row: done for row, done in run(engine_of(model), Requests.of(clean, params)).items() if 7 not in done[0]
    }
    bad = [row for row, prompt in enumerate(clean) if prompt[:20] == clean[0][:20]]
    for row in bad:
        clean[row][10] = 7
    engine = engine_of(model, max_num_seqs=4, kv_cache_tokens=1024)
    engine.runner.decoder.embedding[7] = float("nan")
    found = run(engine, Requests.of(clean, params))
    assert all(found[row] == ([], FinishReason.ERROR) for row in bad)
    rest = set(expected) - set(bad)
    assert len(rest) > 10 and all(found[row] == expected[row] for row in rest)


def test_the_tree_refuses_rows_in_another_order() -> None:
    tree = PrefixTree(BlockManager(20), 2)
    tree.enter(0, 0)
    with pytest.raises(AssertionError, match="another order"):
        tree.enter(1, 1)


@pytest.mark.parametrize("seats", [3, 16])
def test_rows_that_are_preempted_come_to_the_same_end(make_model: Callable[..., Path], seats: int) -> None:
    """The first rows end early, so that little is expected of the others, which then need more than there is."""
    model = make_model("llama")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 320, int(rng.integers(5, 40))).tolist() for _ in range(80)]
    unended = SamplingParams(max_tokens=100, temperature=1.0, ignore_eos=True)
    free = tokens(engine_of(model), Requests.of(prompts, unended, seeds=range(80)))
    stop = [t[3] for t in list(free.values())[:40]]
    tokenizer = IdsAsText(eos_ids=tuple(sorted(set(stop))[:12]))
    params = SamplingParams(max_tokens=100, temperature=1.0)
    requests = Requests.of(prompts, params, seeds=range(80))
    expected = run(engine_of(model, tokenizer, learned_admission=False), requests)
    engine = engine_of(model, tokenizer, kv_cache_tokens=512 + 64, max_num_seqs=seats)
    assert run(engine, requests) == expected
    assert (engine.stats().preemptions > 0) == (seats == 16)


def test_what_is_learned_lets_more_rows_run_side_by_side(make_model: Callable[..., Path]) -> None:
    model = make_model("llama")
    prompts = [[5 + i % 300, 9] for i in range(200)]
    free = tokens(engine_of(model), Requests.of(prompts, SamplingParams(max_tokens=8, ignore_eos=True)))
    eos = tuple({t[5] for t in free.values()})
    requests = Requests.of(prompts, SamplingParams(max_tokens=400))

    def steps(learned: bool) -> int:
        engine = engine_of(model, IdsAsText(eos_ids=eos), kv_cache_tokens=1024, learned_admission=learned)
        assert len(run(engine, requests)) == 200
        return engine.stats().steps

    assert steps(True) < 0.5 * steps(False)


def test_memory_for_keys_and_values_can_be_limited(make_model: Callable[..., Path]) -> None:
    model = make_model("llama")
    requests = Requests.of(prompts_of(30, 200), SamplingParams(max_tokens=8, ignore_eos=True))
    engine = engine_of(model, kv_cache_memory_bytes=600 * 768)
    assert engine.runner.kv_cache_bytes <= (600 + 2 * 32) * 768
    assert tokens(engine, requests) == tokens(engine_of(model), requests)
    [note] = engine.stats().notes
    assert note.endswith("fewer rows run side by side (--kv-cache-memory-bytes 460800)")
    with pytest.raises(ValueError, match=r"max_model_len 512 needs .* are available: --kv-cache-memory-bytes 1000;"):
        engine_of(model, kv_cache_memory_bytes=1000)


def test_a_preempted_row_does_not_wait_for_a_prefix_that_waits_for_it(make_model: Callable[..., Path]) -> None:
    """The pool holds the prefix that the next row wants, or the row that was preempted, whose prompt is all its own:
    with nobody running neither would ever be freed."""
    model = make_model("llama")
    rng = np.random.default_rng(0)
    template = rng.integers(2, 320, 320).tolist()
    prompts = [template + rng.integers(2, 320, 10).tolist() for _ in range(44)]
    params = SamplingTable.of([SamplingParams(max_tokens=182, ignore_eos=ignore) for ignore in (False, True)])
    # Of the first 32 all end at once, so that little is expected of the others, which do not end at all.
    plain = Requests.of(prompts, params[1])
    free = tokens(engine_of(model, kv_cache_tokens=512 * 16), plain)
    ends = IdsAsText(eos_ids=tuple({free[row][3] for row in range(32)}))
    index = np.array([0] * 32 + [1] * 12, np.int32)
    requests = Requests(plain.rows, plain.token_ids, plain.offsets, plain.seeds, params, index)
    expected = tokens(engine_of(model, ends, kv_cache_tokens=512 * 16, learned_admission=False), requests)
    engine = engine_of(model, ends, kv_cache_tokens=512)
    engine.add(requests)
    done: dict[int, list[int]] = {}
    for _ in range(20_000):
        completions = engine.step()
        done |= {row: completions.tokens_of(i) for i, row in enumerate(completions.rows.tolist())}
        if not engine.unfinished:
            break
    assert done == expected and engine.stats().preemptions > 0
    assert_blocks_are_free(engine)


def test_a_step_of_rows_that_are_computed_again_keeps_to_the_budget(make_model: Callable[..., Path]) -> None:
    engine = engine_of(make_model("llama"), max_num_batched_tokens=64, max_num_seqs=20, kv_cache_tokens=20 * 512)
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    engine.add(Requests.of([[5, 6, k] for k in range(2, 22)], params))
    for _ in range(100):
        engine.step()
    # As after a preemption: a prompt that is there, and new tokens that are not.
    engine.table.computed[[0, 3]] = engine.table.prompt_length[[0, 3]]
    while (engine.table.computed[[0, 3]] + 1 < engine.table.length[[0, 3]]).any():
        batch = engine.scheduler.schedule()
        assert batch is not None and batch.query_tokens <= 64
        engine.scheduler.update(batch, np.zeros(len(batch.sequences), np.int64))
