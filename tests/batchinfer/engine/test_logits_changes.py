"""Penalties, bans and the least length, against transformers' `generate`, and with every way to draft."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engines import IdsAsText, engine_of, prompts_of, run, tokens

from batchinfer.engine.config import Speculation
from batchinfer.engine.request import FinishReason, Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable

NEW_TOKENS = 16
# Prompts that repeat themselves, so that n-grams, bad words and penalties meet what is in them.
PROMPTS = [*prompts_of(3, 70), [5, 6], [7, 8, 9] * 20, [7, 8, 9] * 20]

# Options here, and the same in transformers' words.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "repetition": ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    "repetition below one": ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
    "n-grams": ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    "single tokens": ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}),
    "long n-grams": ({"no_repeat_ngram_size": 80}, {"no_repeat_ngram_size": 80}),
    "least": ({"min_tokens": 9}, {"min_new_tokens": 9}),
    "suppressed": ({"suppress_tokens": range(20, 160)}, {"suppress_tokens": list(range(20, 160))}),
    "suppressed at the start": ({"begin_suppress_tokens": range(160)}, {"begin_suppress_tokens": list(range(160))}),
}


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model("llama")


@pytest.fixture(scope="module")
def oracle(model: Path) -> Callable[..., dict[int, list[int]]]:
    """`oracle(eos_ids, **settings)`: what transformers generates for `PROMPTS`."""
    there = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def generate(eos_ids: tuple[int, ...], **settings: Any) -> dict[int, list[int]]:
        answers = {}
        for row, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            done = there.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
                eos_token_id=list(eos_ids), pad_token_id=0, **settings,
            )  # fmt: skip
            answers[row] = done[0, len(prompt) :].tolist()
        return answers

    return generate


@pytest.fixture(scope="module")
def plain(oracle: Callable[..., dict[int, list[int]]]) -> dict[int, list[int]]:
    """Answers without any option, which never end before their length."""
    return oracle((319,))


def ended(plain: dict[int, list[int]], eos_ids: tuple[int, ...]) -> dict[int, list[int]]:
    """The plain answers up to the first of these ids."""
    ends = {row: [i + 1 for i, token in enumerate(new) if token in eos_ids] for row, new in plain.items()}
    return {row: new[: min(ends[row], default=len(new))] for row, new in plain.items()}


def words_of(plain: dict[int, list[int]]) -> tuple[tuple[int, ...], ...]:
    """Bad words that the plain answers have: one token, two, and three of which the prompt has the first."""
    return ((plain[0][3],), tuple(plain[1][2:4]), (PROMPTS[2][-1], *plain[2][:2]), (plain[2][5], 300))


def eos_of(plain: dict[int, list[int]]) -> tuple[int, ...]:
    return plain[0][5], plain[1][2]


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_gives_the_answers_of_transformers(
    model: Path, oracle: Callable[..., dict[int, list[int]]], plain: dict[int, list[int]], option: str
) -> None:
    ours, theirs = OPTIONS[option]
    expected = oracle(eos_of(plain), **theirs)
    assert expected != ended(plain, eos_of(plain)) or option == "long n-grams"
    params = SamplingParams(max_tokens=NEW_TOKENS, **ours)
    assert tokens(engine_of(model, IdsAsText(eos_ids=eos_of(plain))), Requests.of(PROMPTS, params)) == expected


def test_bad_words_are_those_of_transformers(
    model: Path, oracle: Callable[..., dict[int, list[int]]], plain: dict[int, list[int]]
) -> None:
    words = words_of(plain)
    expected = oracle((319,), bad_words_ids=[list(word) for word in words])
    assert all(expected[row] != plain[row] for row in range(3))
    params = SamplingParams(max_tokens=NEW_TOKENS, bad_words_ids=words)
    assert tokens(engine_of(model, IdsAsText(eos_ids=(319,))), Requests.of(PROMPTS, params)) == expected


def test_all_options_together_give_the_answers_of_transformers(
    model: Path, oracle: Callable[..., dict[int, list[int]]], plain: dict[int, list[int]]
) -> None:
    ours, theirs = everything(plain)
    expected = oracle(eos_of(plain), **theirs)
    requests = Requests.of(PROMPTS, SamplingParams(max_tokens=NEW_TOKENS, **ours))
    assert (eos_of(plain)[0],) in words_of(plain), "an end of text is never a bad word"
    assert tokens(engine_of(model, IdsAsText(eos_ids=eos_of(plain))), requests) == expected


def everything(plain: dict[int, list[int]]) -> tuple[dict[str, Any], dict[str, Any]]:
    words = words_of(plain)
    ours = {
        "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_tokens": 9, "suppress_tokens": range(20, 60),
        "begin_suppress_tokens": range(160), "bad_words_ids": words,
    }  # fmt: skip
    theirs = {
        "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 9,
        "suppress_tokens": list(range(20, 60)), "begin_suppress_tokens": list(range(160)),
        "bad_words_ids": [list(word) for word in words],
    }  # fmt: skip
    return ours, theirs


def test_presence_and_frequency_are_counted_over_the_answer_alone(model: Path) -> None:
    """The formula is the one that vLLM and OpenAI document: logit - frequency * count - presence * (count > 0)."""
    there = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for presence, frequency, repetition in ((1.5, 0.0, 1.0), (0.0, 0.7, 1.0), (-0.5, 0.4, 1.1)):
        expected = {}
        for row, prompt in enumerate(PROMPTS):
            answer: list[int] = []
            for _ in range(NEW_TOKENS):
                with torch.no_grad():
                    logits = there(torch.tensor([prompt + answer])).logits[0, -1].numpy().astype(np.float32)
                seen = np.unique(prompt + answer)
                factor = np.float32(repetition)
                logits[seen] = np.where(logits[seen] < 0, logits[seen] * factor, logits[seen] / factor)
                count = np.bincount(answer, minlength=len(logits))
                answer.append(int((logits - frequency * count - presence * (count > 0)).argmax()))
            expected[row] = answer
        params = SamplingParams(
            max_tokens=NEW_TOKENS, ignore_eos=True, presence_penalty=presence, frequency_penalty=frequency,
            repetition_penalty=repetition,
        )  # fmt: skip
        assert tokens(engine_of(model), Requests.of(PROMPTS, params)) == expected, (presence, frequency)


MIXED = (
    SamplingParams(),
    SamplingParams(repetition_penalty=1.5),
    SamplingParams(temperature=1.0, presence_penalty=1.0, frequency_penalty=0.5),
    SamplingParams(temperature=0.8, top_k=20, top_p=0.9, no_repeat_ngram_size=2, min_tokens=12),
    SamplingParams(min_tokens=20, suppress_tokens=(3, 4, 5), begin_suppress_tokens=tuple(range(100))),
)


def test_a_row_among_others_is_the_row_by_itself(model: Path) -> None:
    """Twins too, which differ in their params alone."""
    params = SamplingTable.of([replace(p, max_tokens=NEW_TOKENS) for p in MIXED])
    prompts = [prompt for prompt in PROMPTS for _ in params]
    requests = replace(
        Requests.of(prompts, params[0], range(len(prompts))),
        params=params,
        param_index=np.tile(np.arange(len(params)), len(PROMPTS)).astype(np.int32),
    )
    assert run(engine_of(model), requests) == run(engine_of(model, max_num_seqs=1), requests)


def test_a_row_that_was_preempted_goes_on_with_what_it_had(model: Path) -> None:
    params = SamplingParams(max_tokens=NEW_TOKENS, repetition_penalty=1.2, frequency_penalty=0.1, min_tokens=9)
    requests = Requests.of(PROMPTS, params)
    truth = tokens(engine_of(model), requests)
    engine = engine_of(model)
    engine.add(requests)
    for _ in range(6):
        engine.step()
    for place in np.flatnonzero(engine.table.active).tolist():
        engine.scheduler.admission.preempt(place)
    found = {}
    while engine.unfinished:
        done = engine.step()
        found |= {row: done.tokens_of(i) for i, row in enumerate(done.rows.tolist())}
    assert found == truth and engine.stats().preemptions == len(PROMPTS)


SPECULATIONS = {
    "ngram": Speculation("ngram", gate=False),
    "suffix": Speculation("suffix", gate=False),
    "gated": Speculation("auto"),
}


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("drafter", [*SPECULATIONS, "draft_model"])
def test_drafts_change_no_answer(
    model: Path, make_model: Callable[..., Path], plain: dict[int, list[int]], drafter: str, temperature: float
) -> None:
    """Each draft is verified by the logits of its own position, in which the drafts before it are counted."""
    draft = make_model("llama")
    speculation = SPECULATIONS.get(drafter) or Speculation("draft_model", model=draft, gate=False)
    ours, _ = everything(plain)
    tokenizer = IdsAsText(eos_ids=eos_of(plain))
    for options in (
        {"repetition_penalty": 1.1, "presence_penalty": 0.4, "frequency_penalty": 0.3},
        {"no_repeat_ngram_size": 3, "min_tokens": 12, "stop_token_ids": (plain[2][8], plain[4][9])},
        ours,
    ):
        params = SamplingParams(max_tokens=40, temperature=temperature, **options)
        requests = Requests.of(PROMPTS, params, range(len(PROMPTS)))
        truth = run(engine_of(model, tokenizer, speculation=Speculation("off")), requests)
        engine = engine_of(model, tokenizer, speculation=speculation)
        assert run(engine, requests) == truth, options
        if drafter == "draft_model" and "stop_token_ids" not in options:
            # The same model, with the same changes to its logits, is right unless an answer ends.
            assert engine.stats().accepted > 0.7 * engine.stats().drafted > 0


def test_a_stop_token_ends_the_answer(model: Path, plain: dict[int, list[int]]) -> None:
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, stop_token_ids=(plain[2][8], 1))
    done = run(engine_of(model), Requests.of(PROMPTS, params))
    assert {row: answer for row, (answer, _) in done.items()} == ended(plain, params.stop_token_ids)
    for answer, reason in done.values():
        assert (reason is FinishReason.STOP) == (answer[-1] in params.stop_token_ids)
    assert done[2][1] is FinishReason.STOP


def test_a_row_whose_tokens_are_all_banned_is_an_error(model: Path) -> None:
    params = SamplingParams(max_tokens=3, suppress_tokens=tuple(range(320)))
    (completions,) = list(engine_of(model).generate(Requests.of([[5, 6]], params)))
    assert completions.errors[0].code == "not_finite" and "every token is banned" in completions.errors[0].message


def test_rows_without_options_change_no_logits(model: Path) -> None:
    engine = engine_of(model)
    engine.add(Requests.of(PROMPTS, SamplingParams(max_tokens=2, stop_token_ids=(9,))))
    batch = engine.scheduler.schedule()
    assert batch is not None and batch.changes is None
    engine.runner.launch(batch)
    assert "penalties and bans" not in engine.stats().kernels
