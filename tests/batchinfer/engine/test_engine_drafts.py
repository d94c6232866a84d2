"""With drafts and without: the same output, whoever drafts and however badly."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drafters import Adversary, Poisoner
from engines import IdsAsText, engine_of, prompts_of, run, tokens

from batchinfer.engine.config import Speculation
from batchinfer.engine.drafts.gate import Gate
from batchinfer.engine.engine import Engine
from batchinfer.engine.new_tokens import NewTokens
from batchinfer.engine.request import Completions, FinishReason, Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.kernels.ragged import Ints
from batchinfer.models.batch import Batch


def off(model: Path, tokenizer: IdsAsText | None = None, **settings: Any) -> Engine:
    return engine_of(model, tokenizer, speculation=Speculation("off"), **settings)


ADVERSARIES = {"always right": (1.0, 9), "always wrong": (0.0, 6), "sometimes right": (0.7, 7), "one": (0.5, 1)}
TYPES = [("float32", "none", "auto"), ("bfloat16", "w8a8-int8", "auto"), ("float32", "w8a8-int8", "int8")]


@pytest.mark.parametrize(("dtype", "quantization", "kv_cache_dtype"), TYPES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_no_drafts_change_a_row(
    make_model: Callable[..., Path],
    dtype: str,
    quantization: str,
    kv_cache_dtype: str,
    temperature: float,
    adversary: str,
) -> None:
    """Ends of text and stop strings inside drafts, blocks that begin in the middle of a draft, ragged drafts.

    What is wrong is never accepted, by no draw of luck either (vllm-ascend#13730); a draw is not spoiled by the drafts
    before it (vllm-ascend#2881); a greedy token is the same however many tokens are computed beside it (vllm#54506).
    """
    model = make_model("mistral", sliding_window=100)
    prompts = [*prompts_of(14, 120), [2] * 31, [3] * 32, [4] * 63, [5] * 64]
    params = SamplingParams(max_tokens=60, temperature=temperature, ignore_eos=True, top_p=0.95)
    settings = {"dtype": dtype, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
    seeds = range(100, 100 + len(prompts))
    free = tokens(off(model, **settings), Requests.of(prompts, params, seeds))
    stop = "".join(chr(256 + t) for t in free[2][20:22])
    tokenizer = IdsAsText(eos_ids=(free[0][17], free[5][40]))
    for changes in ({"ignore_eos": False}, {"stop": (stop,)}, {"ignore_eos": False, "max_tokens": 33}):
        changed = SamplingParams(**{**params.__dict__, **changes})
        requests = Requests.of(prompts, changed, seeds)
        truth = run(off(model, tokenizer, **settings), requests)
        engine = off(model, tokenizer, **settings)
        drafter = Adversary(engine, truth, *ADVERSARIES[adversary])
        engine.drafter = drafter  # type: ignore[assignment]
        assert run(engine, requests) == truth, changes
        stats = engine.stats()
        assert stats.drafted > 100 and (stats.accepted > 0.9 * stats.drafted) == (adversary == "always right")
        assert stats.accepted == 0 or adversary != "always wrong"
    assert {reason for _, reason in truth.values()} == {FinishReason.STOP, FinishReason.LENGTH}


MIXED = (
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=1.0, top_k=4),
    SamplingParams(temperature=1.0, top_p=0.4),
    SamplingParams(temperature=1.0, min_p=0.3),
    SamplingParams(temperature=2.0, top_k=40, top_p=0.8, min_p=0.05),
    SamplingParams(temperature=1.0, repetition_penalty=5.0, presence_penalty=2.0),
    SamplingParams(temperature=1.0, top_k=4, no_repeat_ngram_size=1, suppress_tokens=tuple(range(100))),
)


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_rows_keep_their_own_parameters_beside_others(make_model: Callable[..., Path], adversary: str) -> None:
    """Each token of a draft is verified by the parameters of its own row (vllm#10198).

    The truth is of rows that run alone: side by side without drafts, the same ones may be mistaken for others'.
    """
    model = make_model("llama")
    first, second = prompts_of(2, 60)
    rows = [(prompt, seed, i) for prompt in (first, second) for seed in (7, 8) for i in range(len(MIXED))]
    params = SamplingTable.of([replace(p, max_tokens=24, ignore_eos=True) for p in MIXED])
    requests = Requests.of([prompt for prompt, _, _ in rows], params[0], [seed for _, seed, _ in rows])
    requests = replace(requests, params=params, param_index=np.array([i for _, _, i in rows], np.int32))
    truth = run(off(model, max_num_seqs=1), requests)
    of_row = {(tuple(prompt), seed, i): tuple(truth[row][0]) for row, (prompt, seed, i) in enumerate(rows)}
    for prompt in (tuple(first), tuple(second)):
        assert all(len({of_row[prompt, seed, i] for i in range(len(MIXED))}) == len(MIXED) for seed in (7, 8))
        assert [of_row[prompt, 7, i] == of_row[prompt, 8, i] for i in range(len(MIXED))] == [True, *[False] * 8]
    for order in (np.arange(len(rows)), np.random.default_rng(0).permutation(len(rows))):
        engine = off(model)
        engine.drafter = Adversary(engine, truth, *ADVERSARIES[adversary])  # type: ignore[assignment]
        assert run(engine, requests.take(order)) == truth
        assert engine.stats().drafted > 100


class ToTheEnd(Adversary):
    """As many drafts as there is room for; keeps how far they went."""

    reach = 0

    def draft(self, places: Ints, room: Ints, prompt_tokens: int, budget: int) -> Ints:
        counts = super().draft(places, room, prompt_tokens, budget)
        ends = self.table.length[places] + counts
        assert (ends < self.table.end[places]).all(), "the last token of a row is drawn and never computed"
        self.reach = max(self.reach, int(ends[counts > 0].max(initial=0)))
        return counts


@pytest.mark.parametrize("share_right", [1.0, 0.7])
@pytest.mark.parametrize("longest", [96, 100, 128, 129])
def test_drafts_go_as_far_as_the_context(make_model: Callable[..., Path], longest: int, share_right: float) -> None:
    """Prompt and new tokens fill the table to its last column, in a last block that is full, begun or has one token.

    Positions behind a draft that was cut off are taken again, up to the last (transformers#30042, transformers#30413).
    """
    model = make_model("llama")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 320, n).tolist() for n in (1, 31, 40, 64, 65, longest - 3, longest - 2, longest - 1)]
    params = SamplingTable.of(
        [SamplingParams(max_tokens=longest - len(p), temperature=0.7, ignore_eos=True) for p in prompts]
    )
    requests = Requests.of(prompts, params[0], seeds=range(len(prompts)))
    requests = replace(requests, params=params, param_index=np.arange(len(prompts), dtype=np.int32))
    truth = run(off(model, max_model_len=longest), requests)
    assert all(len(p) + len(truth[row][0]) == longest for row, p in enumerate(prompts))
    engine = off(model, max_model_len=longest)
    drafter = ToTheEnd(engine, truth, share_right, 70, 70)
    engine.drafter = drafter  # type: ignore[assignment]
    assert run(engine, requests) == truth
    assert drafter.reach == longest - 1 and engine.stats().drafted > 100
    engine = engine_of(model, max_model_len=longest, speculation=Speculation("draft_model", 9, model, gate=False))
    assert run(engine, requests) == truth
    assert engine.stats().accepted > 50


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stop_string_that_a_draft_completes_ends_the_row(make_model: Callable[..., Path], temperature: float) -> None:
    """The drafts go on behind it, to what the row would have had without it, an end of text among that."""
    model = make_model("llama")
    prompts = prompts_of(10, 60)
    params = SamplingParams(max_tokens=40, temperature=temperature, ignore_eos=True)
    free = run(off(model), Requests.of(prompts, params, seeds=range(10)))
    text = {row: "".join(chr(256 + t) for t in new) for row, (new, _) in free.items()}
    # Steps end with the tokens 1, 11, 21, ...: inside a draft, across the border of two, and right before a border.
    stops = {row: text[row][a:b] for row, a, b in ((1, 13, 16), (3, 19, 23), (6, 26, 30))}
    tokenizer = IdsAsText(eos_ids=(free[1][0][18],))
    requests = Requests.of(prompts, replace(params, ignore_eos=False, stop=tuple(stops.values())), seeds=range(10))
    truth = run(off(model, tokenizer), requests)
    engine = off(model, tokenizer)
    engine.drafter = Adversary(engine, free, 1.0, 9, 9)  # type: ignore[assignment]
    found = run(engine, requests)
    assert found == truth
    for row, stop in stops.items():
        new, reason = found[row]
        assert reason is FinishReason.STOP and new == free[row][0][: len(new)]
        assert "".join(chr(256 + t) for t in new).endswith(stop) and len(new) % 10 != 1
    assert FinishReason.LENGTH in {reason for _, reason in found.values()}


def test_oracles_save_the_steps_that_they_should(make_model: Callable[..., Path]) -> None:
    """Each step goes on where the last accepted draft ended, not where the drafts did (transformers#30042)."""
    requests = Requests.of([[5, 6, 7]], SamplingParams(max_tokens=41, ignore_eos=True))
    truth = run(off(make_model("llama")), requests)
    engine = off(make_model("llama"))
    engine.drafter = Adversary(engine, truth, 1.0, 4, 4)  # type: ignore[assignment]
    assert run(engine, requests) == truth
    assert engine.stats().steps == 1 + 8, "the prompt gives one token, each step after it five"
    assert engine.stats().accepted == 32


@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("method", ["auto", "ngram", "suffix", "draft_model"])
def test_every_drafter_gives_the_same_rows(
    make_model: Callable[..., Path], method: str, gate: bool, temperature: float
) -> None:
    """However many tokens a step has, a row gets the same (vllm#54506, vllm#41758)."""
    model, small = make_model("llama"), make_model("qwen3")
    prompts = [[*p, *p[:10], *p] for p in prompts_of(6, 40)] * 2
    requests = Requests.of(prompts, SamplingParams(max_tokens=80, temperature=temperature), seeds=range(12))
    draft = small if method == "draft_model" else None
    speculation = Speculation(method, 5, draft, gate=gate)
    engine = engine_of(model, speculation=speculation, max_num_seqs=5)
    assert run(engine, requests) == run(off(model), requests)
    assert gate or engine.stats().drafted > 50


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.4}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_a_draft_model_that_is_the_target_is_nearly_always_right(
    make_model: Callable[..., Path], changes: dict[str, Any]
) -> None:
    """Sampled at temperature 1: an independent draw would hardly ever be the same.

    A drafter that ignores a parameter would be wrong wherever that matters (dflash#74).
    """
    model = make_model("llama")
    params = replace(SamplingParams(max_tokens=60, temperature=1.0, ignore_eos=True), **changes)
    requests = Requests.of(prompts_of(8, 150), params, seeds=range(8))
    engine = engine_of(model, speculation=Speculation("draft_model", 4, model, gate=False), max_num_seqs=3)
    assert tokens(engine, requests) == tokens(off(model), requests)
    stats = engine.stats()
    assert stats.accepted > 0.95 * stats.drafted > 200


class Interrupted:
    """A `Gate` whose model draws with other seeds in one step, is not asked for some, and then drafts again."""

    wanted = True

    def __init__(self, drafter: Gate, pause: int) -> None:
        assert drafter.model is not None
        self.drafter, self.model, self.pause = drafter, drafter.model, pause
        self.steps = self.drafted = self.accepted = self.misled = 0
        self.back = False

    def draft(self, places: Ints, room: Ints, prompt_tokens: int, budget: int) -> Ints:
        self.steps += 1
        within = self.steps % (self.pause + 4)
        self.back = within > self.pause
        if 0 < within <= self.pause:
            room = np.zeros_like(room)
        seeds = self.model.table.seed
        if within == 0:
            self.model.table.seed = seeds + 1000
        counts = self.drafter.draft(places, room, prompt_tokens, budget)
        self.model.table.seed = seeds
        return counts

    def settle(self, batch: Batch, new_tokens: NewTokens, seconds: float) -> None:
        self.drafter.settle(batch, new_tokens, seconds)
        if self.back:
            self.drafted += batch.drafted
            self.accepted += new_tokens.accepted
        else:
            self.misled += batch.drafted - new_tokens.accepted

    def remember(self, done: Completions) -> None:
        self.drafter.remember(done)


@pytest.mark.parametrize("pause", [20, 80])
def test_a_draft_model_that_paused_is_right_again_at_once(make_model: Callable[..., Path], pause: int) -> None:
    """What it had drafted last is not what followed, and of what followed it has seen nothing (TensorRT-LLM#16888).

    Up to a tile it reads token by token, more in tiles.
    """
    model = make_model("llama")
    params = SamplingParams(max_tokens=300, temperature=1.0, ignore_eos=True)
    requests = Requests.of(prompts_of(6, 100), params, seeds=range(6))
    engine = engine_of(model, speculation=Speculation("draft_model", 8, model, gate=False), max_num_seqs=3)
    assert engine.drafter is not None
    drafter = Interrupted(engine.drafter, pause)
    engine.drafter = drafter  # type: ignore[assignment]
    assert tokens(engine, requests) == tokens(off(model), requests)
    assert drafter.accepted > 0.95 * drafter.drafted > 200
    assert drafter.misled > 50


def test_a_draft_model_knows_how_much_it_has_yet_to_read(make_model: Callable[..., Path]) -> None:
    """A gate that took long prompts for read would pay for reading them in its first draft."""
    model = make_model("llama")
    requests = Requests.of([[5, 6, 7] * 30, [8, 9] * 20], SamplingParams(max_tokens=60, ignore_eos=True))
    engine = engine_of(model, speculation=Speculation("draft_model", 4, model, gate=False), max_num_seqs=2)
    assert engine.drafter is not None and engine.drafter.model is not None
    engine.add(requests)
    engine.step()
    places = np.array([0, 1])
    assert engine.drafter.model.behind(places) == 90 + 1 + 40 + 1, "nothing was drafted for so far"
    for _ in range(3):
        engine.step()
    assert engine.drafter.model.behind(places) <= 2 * 2


def test_rows_that_are_preempted_are_drafted_for_again(make_model: Callable[..., Path]) -> None:
    """In another place, behind what they had, with nothing left of who was there before."""
    model = make_model("llama")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 320, int(rng.integers(5, 40))).tolist() for _ in range(80)]
    unended = SamplingParams(max_tokens=100, temperature=1.0, ignore_eos=True)
    free = tokens(off(model), Requests.of(prompts, unended, seeds=range(80)))
    tokenizer = IdsAsText(eos_ids=tuple(sorted({t[3] for t in list(free.values())[:40]})[:12]))
    requests = Requests.of(prompts, SamplingParams(max_tokens=100, temperature=1.0), seeds=range(80))
    truth = run(off(model, tokenizer, learned_admission=False), requests)
    for speculation in (Speculation("draft_model", 3, model, gate=False), Speculation("suffix", gate=False)):
        engine = engine_of(model, tokenizer, kv_cache_tokens=512 + 64, speculation=speculation)
        assert run(engine, requests) == truth
        assert engine.stats().preemptions > 0 and engine.stats().drafted > 0


def test_a_draft_that_is_not_finite_spoils_nothing(make_model: Callable[..., Path]) -> None:
    """Attention weighs what a token does not see by zero, which is no help against NaN."""
    model = make_model("llama")
    prompts = [[t if t != 7 else 8 for t in prompt] for prompt in prompts_of(10, 80)]
    requests = Requests.of(prompts, SamplingParams(max_tokens=50, ignore_eos=True))
    truth = {row: done for row, done in run(off(model), requests).items() if 7 not in done[0]}
    assert len(truth) > 5

    rows = sorted(truth)
    requests = requests.take(np.array(rows))
    engine = off(model)
    engine.runner.decoder.embedding[7] = float("nan")
    engine.drafter = Poisoner(engine, truth, 1.0, 40)  # type: ignore[assignment]
    found = run(engine, requests)
    assert found == truth
    assert engine.stats().drafted > 50
    for cache in engine.runner.caches:
        assert cache.key.isfinite().all() and cache.value.isfinite().all()
