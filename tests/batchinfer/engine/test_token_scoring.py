"""Log-probabilities of tokens are those of transformers, whatever runs beside a row and whoever computed its prompt."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from drafters import Adversary
from engines import assert_blocks_are_free, engine_of, prompts_of
from families import made
from numpy.typing import NDArray

from batchinfer.engine.config import Speculation
from batchinfer.engine.engine import Engine
from batchinfer.engine.request import FinishReason, Requests, TokenScores
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.kernels.grain import TILE

WANTED = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=2)


@pytest.fixture(params=["llama", "lfm2", "qwen3_moe", "qwen3_5_text", "gemma4_text"])
def model(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Path:
    return made(make_model, request.param)


@pytest.fixture
def llama(make_model: Callable[..., Path]) -> Path:
    return made(make_model, "llama")


def tree_of_prompts() -> list[list[int]]:
    """In depth-first order: rows that branch after one tile, after three, and after five; twins; and others.

    Some branch right at the end of a tile, with tokens of their own there; some are alike a little further.
    """
    rng = np.random.default_rng(0)

    def text(n: int) -> list[int]:
        return rng.integers(2, 320, n).tolist()

    stem = text(5 * TILE)
    prompts = [text(40), *(stem + text(n) for n in (1, 30, 64, 70))]
    prompts += [stem[: 3 * TILE] + text(n) for n in (20, 90)]
    prompts += [stem[: TILE + 5] + text(n) for n in (5, 100)]
    return [*prompts, prompts[-1], prompts[-1], text(TILE), text(TILE + 1), text(3), [7], [7]]


Row = tuple[list[int], TokenScores | None, TokenScores | None]


def rows_of(engine: Engine, requests: Requests) -> dict[int, Row]:
    """The new tokens of each row, and the log-probabilities of these and of the prompt's."""
    found: dict[int, Row] = {}
    for done in engine.generate(requests):
        for i, row in enumerate(done.rows.tolist()):
            assert done.finish_reasons[i] != FinishReason.ERROR and row not in found
            one = np.array([i])
            found[row] = (
                done.tokens_of(i),
                done.logprobs and done.logprobs.take(one),
                done.prompt_logprobs and done.prompt_logprobs.take(one),
            )
    assert_blocks_are_free(engine)
    assert not engine.scheduler.scores._pieces
    return found


def by_transformers(model: Path) -> Callable[[list[int]], NDArray[np.float32]]:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def logits(tokens: list[int]) -> NDArray[np.float32]:
        """Log-probabilities [n, V] of what follows each token."""
        with torch.no_grad():
            found: NDArray[np.float32] = torch.log_softmax(oracle(torch.tensor([tokens])).logits[0], -1).numpy()
        return found

    return logits


def assert_scores(found: TokenScores | None, tokens: list[int], expected: NDArray[np.float32], k: int) -> None:
    """`expected` [m, V] are the log-probabilities in the places of `tokens` [m]."""
    assert found is not None
    assert found.token_ids.tolist() == tokens
    np.testing.assert_allclose(found.values, expected[np.arange(len(tokens)), tokens], atol=1e-4)
    assert found.top_ids.shape == (len(tokens), k)
    np.testing.assert_allclose(found.top_values, -np.sort(-expected, -1)[:, :k], atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(expected, found.top_ids, -1), found.top_values, atol=1e-4)


def assert_same(ours: TokenScores | None, theirs: TokenScores | None) -> None:
    assert (ours is None) == (theirs is None)
    for name in ("token_ids", "values", "top_ids", "top_values"):
        np.testing.assert_array_equal(getattr(ours, name, None), getattr(theirs, name, None))


def scoring(prompts: list[list[int]], scored_from: list[int], logprobs: int = 1) -> Requests:
    return replace(Requests.of(prompts, SamplingParams(logprobs=logprobs)), scored_from=np.array(scored_from))


def test_they_are_those_of_transformers(model: Path) -> None:
    prompts, expected = tree_of_prompts(), by_transformers(model)
    for row, (new, answer, prompt) in rows_of(engine_of(model), Requests.of(prompts, WANTED)).items():
        known = prompts[row]
        logits = expected([*known, *new])
        assert len(new) == 5
        assert_scores(answer, new, logits[len(known) - 1 : -1], 3)
        assert_scores(prompt, known[1:], logits[: len(known) - 1], 2)


def test_rows_that_generate_nothing_have_those_of_their_own_tokens(model: Path) -> None:
    prompts, expected = [prompt for prompt in tree_of_prompts() if len(prompt) > 1], by_transformers(model)
    scored_from = [max(1, len(prompt) - 6) for prompt in prompts]
    engine = engine_of(model)
    found = rows_of(engine, scoring(prompts, scored_from))
    assert set(found) == set(range(len(prompts)))
    for row, (tokens, answer, prompt) in found.items():
        first = scored_from[row]
        assert tokens == prompts[row][first:] and prompt is None
        assert_scores(answer, tokens, expected(prompts[row])[first - 1 : -1], 1)
    assert engine.stats().prompt_tokens < sum(map(len, prompts)), "shared tiles are computed once"


def test_a_rows_bits_do_not_depend_on_what_runs_beside_it(model: Path) -> None:
    requests = Requests.of(tree_of_prompts(), replace(WANTED, max_tokens=12))
    engine = engine_of(model, prefix_sharing=False, max_num_seqs=1)
    alone = {row: rows_of(engine, requests.take(np.array([row])))[row] for row in range(len(requests))}
    ways: list[dict[str, Any]] = [{"max_num_seqs": 3}, {"max_num_batched_tokens": 64}, {"kv_cache_tokens": 640}]
    for settings in ways:
        for row, found in rows_of(engine_of(model, **settings), requests).items():
            assert found[0] == alone[row][0]
            assert_same(found[1], alone[row][1])
            assert_same(found[2], alone[row][2])


def test_rows_that_want_more_than_the_maker_of_their_tiles(model: Path) -> None:
    prompts = [prompt for prompt in tree_of_prompts() if len(prompt) > 1]
    rng = np.random.default_rng(5)
    for _ in range(4):
        scored_from = [int(rng.integers(1, len(prompt))) for prompt in prompts]
        requests = scoring(prompts, scored_from)
        together = rows_of(engine_of(model), requests)
        whole = rows_of(engine_of(model, prefix_sharing=False), scoring(prompts, [1] * len(prompts)))
        for row, first in enumerate(scored_from):
            answer, expected = together[row][1], whole[row][1]
            assert answer is not None and expected is not None
            np.testing.assert_array_equal(answer.values, expected.values[first - 1 :])
            np.testing.assert_array_equal(answer.top_ids, expected.top_ids[first - 1 :])


def test_rows_that_want_them_and_rows_that_do_not_share_tiles(model: Path) -> None:
    requests = Requests.of(tree_of_prompts(), WANTED)
    plain = replace(WANTED, logprobs=-1, prompt_logprobs=-1)
    few = replace(WANTED, logprobs=0, prompt_logprobs=0)
    mixed = replace(
        requests,
        params=SamplingTable.of([WANTED, plain, few]),
        param_index=np.arange(len(requests), dtype=np.int32) % 3,
    )
    expected = rows_of(engine_of(model), requests)
    for first in range(3):
        shifted = replace(mixed, param_index=(mixed.param_index + np.int32(first)) % 3)
        for row, (new, answer, prompt) in rows_of(engine_of(model), shifted).items():
            assert new == expected[row][0]
            full_answer, full_prompt = expected[row][1:]
            assert full_answer is not None and full_prompt is not None
            kind = int(shifted.param_index[row])
            if kind == 1:
                assert not answer or not len(answer.values)
                assert not prompt or not len(prompt.values)
            else:
                assert answer is not None and prompt is not None
                np.testing.assert_array_equal(answer.values, full_answer.values)
                np.testing.assert_array_equal(prompt.values, full_prompt.values)
                wide = full_prompt.top_ids.shape[1]
                tops = prompt.top_ids[:, :wide]
                assert np.array_equal(tops, full_prompt.top_ids) if kind == 0 else (prompt.top_ids == -1).all()


def test_accepted_drafts_have_their_own(model: Path) -> None:
    requests = Requests.of(prompts_of(6, 70), replace(WANTED, max_tokens=20))
    plain = rows_of(engine_of(model, speculation=Speculation("off")), requests)
    engine = engine_of(model)
    truth = {row: (new, FinishReason.LENGTH) for row, (new, _, _) in plain.items()}
    engine.drafter = cast(Any, Adversary(engine, truth, share_right=0.7, longest=6))
    for row, (new, answer, _) in rows_of(engine, requests).items():
        assert new == plain[row][0]
        assert_same(answer, plain[row][1])
    assert 0 < engine.stats().accepted < engine.stats().drafted


def test_drafts_from_the_row_itself_change_nothing(llama: Path) -> None:
    prompts = [np.random.default_rng(n).integers(2, 320, 12).tolist() * 4 for n in range(6)]
    requests = Requests.of(prompts, replace(WANTED, max_tokens=60))
    plain = rows_of(engine_of(llama, speculation=Speculation("off")), requests)
    engine = engine_of(llama, speculation=Speculation("ngram"))
    for row, (new, answer, _) in rows_of(engine, requests).items():
        assert new == plain[row][0]
        assert_same(answer, plain[row][1])
    assert engine.stats().accepted > 0


def test_they_are_those_before_penalties_temperature_and_grammars(llama: Path) -> None:
    prompts, expected = prompts_of(4, 30), by_transformers(llama)
    params = replace(WANTED, temperature=1.5, top_k=40, repetition_penalty=1.8, suppress_tokens=tuple(range(2, 100)))
    for row, (new, answer, _) in rows_of(engine_of(llama), Requests.of(prompts, params, [1, 2, 3, 4])).items():
        assert min(new) >= 100 or 1 in new
        assert_scores(answer, new, expected([*prompts[row], *new])[len(prompts[row]) - 1 : -1], 3)


def test_a_step_that_memory_does_not_hold_comes_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Requests.of(tree_of_prompts(), WANTED)
    expected = rows_of(engine_of(model), requests)
    engine = engine_of(model)
    launch, fails = engine.runner.launch, iter([False, True, False, False, True, True] + [False, True] * 3)

    def launched(batch: Any) -> Any:
        if next(fails, False):
            raise torch.OutOfMemoryError("no room")
        return launch(batch)

    monkeypatch.setattr(engine.runner, "launch", launched)
    monkeypatch.setattr(engine, "_shrink", lambda *_: None)
    for row, (new, answer, prompt) in rows_of(engine, requests).items():
        assert new == expected[row][0]
        assert_same(answer, expected[row][1])
        assert_same(prompt, expected[row][2])


def test_the_head_runs_over_prompts_in_parts(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Requests.of(tree_of_prompts(), WANTED)
    expected = rows_of(engine_of(llama), requests)
    monkeypatch.setattr("batchinfer.models.prompt_scores.LOGITS_BYTES", 24 * 4 * 320)
    engine = engine_of(llama)
    head, rows = engine.runner.decoder.logits, []
    monkeypatch.setattr(engine.runner.decoder, "logits", lambda x, y: rows.append(len(x)) or head(x, y))
    for row, (_, _, prompt) in rows_of(engine, requests).items():
        assert_same(prompt, expected[row][2])
    assert max(rows) == 24


def test_preempted_rows_keep_theirs(model: Path) -> None:
    requests = Requests.of(prompts_of(6, 60), replace(WANTED, max_tokens=20))
    expected = rows_of(engine_of(model), requests)
    engine = engine_of(model, speculation=Speculation("off"))
    engine.add(requests)
    for _ in range(6):
        assert not len(engine.step())
    for place in np.flatnonzero(engine.table.active).tolist():
        engine.scheduler.admission.preempt(place)
    for row, (new, answer, prompt) in rows_of(engine, requests.take(np.array([], np.int64))).items():
        assert new == expected[row][0]
        assert_same(answer, expected[row][1])
        assert_same(prompt, expected[row][2])
    assert engine.stats().preemptions == len(requests)


def test_values_that_are_not_finite_are_an_error_of_the_row(llama: Path) -> None:
    engine = engine_of(llama)
    engine.runner.decoder.embedding[50] = float("nan")
    found = {}
    for done in engine.generate(scoring([[3, 4, 9], [3, 50, 9], [5, 6]], [2, 2, 1])):
        found |= dict(zip(done.rows.tolist(), done.finish_reasons.tolist(), strict=True))
    assert found == {0: FinishReason.STOP, 1: FinishReason.ERROR, 2: FinishReason.STOP}
    assert_blocks_are_free(engine)


def test_a_row_of_the_whole_context_can_be_scored(llama: Path) -> None:
    tokens = np.random.default_rng(3).integers(2, 320, 512).tolist()
    _, answer, _ = rows_of(engine_of(llama), scoring([tokens], [1]))[0]
    assert_scores(answer, tokens[1:], by_transformers(llama)(tokens)[:-1], 1)


def test_dropped_rows_leave_nothing_behind(llama: Path) -> None:
    engine = engine_of(llama)
    engine.add(Requests.of(tree_of_prompts(), WANTED))
    for _ in range(3):
        engine.step()
    engine.drop()
    assert not engine.unfinished and not engine.scheduler.scores._pieces
