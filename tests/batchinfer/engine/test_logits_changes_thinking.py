"""The tag that closes a model's thinking after so many tokens, against transformers' `generate`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engines import IdsAsText, engine_of, prompts_of, run, tokens
from torch import Tensor

from batchinfer.engine.config import Speculation
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams

LIMIT, NEW_TOKENS = 5, 14
OPENING, CLOSING = 318, 317
LAST = [7, 8, 9] * 20
PLAIN = [[min(token, 300) for token in prompt] for prompt in prompts_of(4, 70)]  # no tag
PROMPTS = [
    *PLAIN,
    *([*prompt, OPENING, 4] for prompt in PLAIN),  # thinking is opened
    *([*prompt, OPENING, 4, CLOSING] for prompt in PLAIN),  # and closed
    *([*prompt, CLOSING, OPENING] for prompt in (LAST, LAST, [5])),
]
PARAMS = SamplingParams(
    max_tokens=NEW_TOKENS, ignore_eos=True, max_thinking_tokens=LIMIT, thinking_tags=(OPENING, CLOSING)
)


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model("llama")


def generated(model: Path, opening: int, closing: int, limited: bool = True) -> dict[int, list[int]]:
    """What transformers generates, with a processor of logits that closes thinking."""
    there = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    answers = {}
    for row, prompt in enumerate(PROMPTS):

        def close(ids: Tensor, scores: Tensor, start: int = len(prompt)) -> Tensor:
            known = ids[0].tolist()
            tags = [token for token in known if token in (opening, closing)]
            if limited and len(known) == start + LIMIT and tags and tags[-1] == opening:
                scores = torch.full_like(scores, float("-inf"))
                scores[0, closing] = 0
            return scores

        ids = torch.tensor([prompt])
        done = there.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=319,
            pad_token_id=0, logits_processor=transformers.LogitsProcessorList([close]),  # type: ignore[list-item]
        )  # fmt: skip
        answers[row] = done[0, len(prompt) :].tolist()
    return answers


def test_answers_are_those_of_transformers(model: Path) -> None:
    expected = generated(model, OPENING, CLOSING)
    found = tokens(engine_of(model), Requests.of(PROMPTS, PARAMS))
    assert found == expected
    closed = sorted(row for row, answer in found.items() if answer[LIMIT] == CLOSING)
    assert closed == [4, 5, 6, 7, 12, 13, 14]


def test_thinking_that_the_answer_opens_and_closes_itself(model: Path) -> None:
    """The tags are tokens of the plain answers: some answers open their thinking, and some close it in time."""
    plain = generated(model, OPENING, CLOSING, limited=False)
    params = {}
    for opening, closing in ((plain[0][2], CLOSING), (plain[0][2], plain[0][3]), (plain[0][3], plain[0][2])):
        params = {"max_tokens": NEW_TOKENS, "ignore_eos": True, "thinking_tags": (opening, closing)}
        expected = generated(model, opening, closing)
        found = tokens(engine_of(model), Requests.of(PROMPTS, SamplingParams(max_thinking_tokens=LIMIT, **params)))
        assert found == expected
        assert (found[0][LIMIT] == closing) == (closing == CLOSING or opening == plain[0][3])


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("method", ["ngram", "suffix", "draft_model"])
def test_drafts_change_no_answer(model: Path, make_model: Callable[..., Path], method: Any, temperature: float) -> None:
    draft = make_model("llama") if method == "draft_model" else None
    params = SamplingParams(
        max_tokens=40, temperature=temperature, max_thinking_tokens=LIMIT, thinking_tags=(OPENING, CLOSING)
    )
    requests = Requests.of(PROMPTS, params, range(len(PROMPTS)))
    truth = run(engine_of(model, IdsAsText(eos_ids=(319,)), speculation=Speculation("off")), requests)
    engine = engine_of(model, IdsAsText(eos_ids=(319,)), speculation=Speculation(method, model=draft, gate=False))
    assert run(engine, requests) == truth
    assert engine.stats().accepted > 0 or (temperature and method != "draft_model")


def test_a_row_by_itself_and_one_that_was_preempted_end_alike(model: Path) -> None:
    requests = Requests.of(PROMPTS, PARAMS)
    truth = tokens(engine_of(model), requests)
    assert tokens(engine_of(model, max_num_seqs=1), requests) == truth
    for steps in (4, 6, 8):
        engine = engine_of(model, speculation=Speculation("off"))
        engine.add(requests)
        for _ in range(steps):
            engine.step()
        for place in np.flatnonzero(engine.table.active).tolist():
            engine.scheduler.admission.preempt(place)
        found = {}
        while engine.unfinished:
            done = engine.step()
            found |= {row: done.tokens_of(i) for i, row in enumerate(done.rows.tolist())}
        assert found == truth and engine.stats().preemptions == len(PROMPTS)
