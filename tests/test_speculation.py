"""With drafts and without: the same output, whoever drafts and however badly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import IdsAsText, engine_of, prompts_of, run, tokens

from batchinfer.batch import Batch, Ints
from batchinfer.engine import Engine
from batchinfer.gains import Gains
from batchinfer.request import Completions, FinishReason, Requests, SamplingParams
from batchinfer.speculation import Speculation

Done = dict[int, tuple[list[int], FinishReason]]


class Adversary:
    """Drafts without thinking: the truth, or nonsense, in lengths of its own choice."""

    wanted = True

    def __init__(self, engine: Engine, truth: Done, share_right: float, longest: int, shortest: int = 0) -> None:
        self.table, self.truth, self.share_right = engine.table, truth, share_right
        self.shortest, self.longest = shortest, longest
        self.rng = np.random.default_rng(0)

    def draft(self, places: Ints, room: Ints, prompt_tokens: int, budget: int) -> Ints:
        counts = np.minimum(self.rng.integers(self.shortest, self.longest + 1, len(places)), np.maximum(room, 0))
        counts = np.clip(budget - (np.cumsum(counts) - counts), 0, counts)
        for place, count in zip(places.tolist(), counts.tolist(), strict=True):
            length = int(self.table.length[place])
            known = self.truth[int(self.table.row[place])][0][length - int(self.table.prompt_length[place]) :][:count]
            drafts = np.array([*known, *[5] * (count - len(known))], np.int32)
            wrong = self.rng.random(count) >= self.share_right
            drafts[wrong] = (drafts[wrong] + 1) % 320
            self.table.tokens[place, length : length + count] = drafts
        return counts

    def settle(self, batch: Batch, gains: Gains, seconds: float) -> None:
        pass

    def remember(self, done: Completions) -> None:
        pass


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
    """Ends of text and stop strings inside drafts, contexts that end, blocks that begin in the middle of a draft."""
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


def test_oracles_save_the_steps_that_they_should(make_model: Callable[..., Path]) -> None:
    requests = Requests.of([[5, 6, 7]], SamplingParams(max_tokens=41, ignore_eos=True))
    truth = run(off(make_model("llama")), requests)
    engine = off(make_model("llama"))
    engine.drafter = Adversary(engine, truth, 1.0, 4, 4)  # type: ignore[assignment]
    assert run(engine, requests) == truth
    assert engine.stats().steps == 1 + 8, "the prompt gives one token, each step after it five"
    assert engine.stats().accepted == 32


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("method", ["auto", "ngram", "suffix", "draft_model"])
def test_every_drafter_gives_the_same_rows(
    make_model: Callable[..., Path], method: str, gate: bool, temperature: float
) -> None:
    model, small = make_model("llama"), make_model("qwen3")
    prompts = [[*p, *p[:10], *p] for p in prompts_of(12, 40)] * 2
    requests = Requests.of(prompts, SamplingParams(max_tokens=80, temperature=temperature), seeds=range(24))
    draft = small if method == "draft_model" else None
    speculation = Speculation(method, 5, draft, gate=gate)
    engine = engine_of(model, speculation=speculation, max_num_seqs=5)
    assert run(engine, requests) == run(off(model), requests)
    assert gate or engine.stats().drafted > 50


def test_a_draft_model_that_is_the_target_is_nearly_always_right(make_model: Callable[..., Path]) -> None:
    """Sampled at temperature 1: an independent draw would hardly ever be the same."""
    model = make_model("llama")
    params = SamplingParams(max_tokens=60, temperature=1.0, ignore_eos=True)
    requests = Requests.of(prompts_of(8, 150), params, seeds=range(8))
    engine = engine_of(model, speculation=Speculation("draft_model", 4, model, gate=False), max_num_seqs=3)
    assert tokens(engine, requests) == tokens(off(model), requests)
    stats = engine.stats()
    assert stats.accepted > 0.95 * stats.drafted > 200


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

    class Poisoner(Adversary):
        def draft(self, places: Ints, room: Ints, prompt_tokens: int, budget: int) -> Ints:
            counts = super().draft(places, room, prompt_tokens, budget)
            last = self.table.length[places] + counts - 1
            self.table.tokens[places[counts > 0], last[counts > 0]] = 7
            return counts

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
