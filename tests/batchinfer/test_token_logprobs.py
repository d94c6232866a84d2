"""`LLM` returns log-probabilities of tokens, and scores completions, as transformers computes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from chat_models import chat_model

from batchinfer import LLM, SamplingParams

TALK = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(make_model, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, device="cpu", max_num_seqs=4)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def logprobs(folder: Path) -> Callable[[list[int]], Any]:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def find(ids: list[int]) -> Any:
        with torch.no_grad():
            return torch.log_softmax(oracle(torch.tensor([ids])).logits[0], -1).numpy()

    return find


def test_scores_are_those_of_transformers(llm: LLM, theirs: Any, logprobs: Callable[[list[int]], Any]) -> None:
    chat = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    prompts = ["Hello", "Hello", [5, 6, 7], TALK]
    completions = [" the user", [40, 41], [9], [12, 13]]
    hello = theirs("Hello")["input_ids"]
    ids = [theirs("Hello the user")["input_ids"], [*hello, 40, 41], [5, 6, 7, 9], [*chat, 12, 13]]
    found = llm.score(prompts, completions, likeliest=3)
    assert [score.index for score in found] == [0, 1, 2, 3]
    for score, row, first in zip(found, ids, (len(hello), len(hello), 3, len(chat)), strict=True):
        expected = logprobs(row)[first - 1 : -1]
        own = expected[np.arange(len(row) - first), row[first:]]
        assert score.error is None and score.prompt_tokens == first
        assert [token.token_id for token in score.tokens] == row[first:]
        np.testing.assert_allclose([token.logprob for token in score.tokens], own, atol=1e-4)
        assert score.log_probability == pytest.approx(own.sum(), abs=1e-4 * len(own))
        tops = [[top.logprob for top in token.top] for token in score.tokens]
        np.testing.assert_allclose(tops, -np.sort(-expected)[:, :3], atol=1e-4)


def test_what_the_model_answers_at_temperature_0_is_greedy(llm: LLM) -> None:
    (answer,) = llm.generate(["Hello"], SamplingParams(max_tokens=4, ignore_eos=True, logprobs=1))
    same, other = answer.token_ids, [*answer.token_ids[:3], (answer.token_ids[3] + 1) % 500]
    found = llm.score(["Hello", "Hello"], [same, other])
    assert [score.greedy for score in found] == [True, False]
    assert answer.logprobs is not None
    assert [token.top[0].token_id for token in answer.logprobs] == same
    np.testing.assert_allclose(
        [t.logprob for t in found[0].tokens], [t.logprob for t in answer.logprobs], atol=1e-4, rtol=0
    )


def test_what_cannot_be_scored_is_an_error_of_its_own(llm: LLM) -> None:
    found = llm.score(["", "Hello", "Hello", "Hello", "Hello"], [" a", "", [600], " a" * 5000, " a"])
    codes = [score.error and score.error.code for score in found]
    assert codes == ["empty_prompt", "empty_completion", "bad_token_ids", "too_long", None]
    assert [len(score.tokens) for score in found] == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], ["b", "c"]), "completions must be a list with one for each prompt"),
        ((["a"], "b"), "completions must be a list"),
        (("a", ["b"]), "prompts is 'a'"),
    ],
)
def test_wrong_arguments_are_named(llm: LLM, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.score(*arguments)


@pytest.mark.parametrize("likeliest", [0, 21, 1.5, True])
def test_a_wrong_number_of_likeliest_tokens_is_named(llm: LLM, likeliest: Any) -> None:
    with pytest.raises(ValueError, match=r"likeliest is .*; it must be from 1 to 20"):
        llm.score(["a"], ["b"], likeliest=likeliest)
    if likeliest:
        with pytest.raises(ValueError, match=r"logprobs is .*; it must be (from -1 \(off\) to 20|a whole number)"):
            SamplingParams(logprobs=likeliest)


def test_tokens_that_a_form_allows_alone_have_log_probabilities(llm: LLM) -> None:
    form = {"enum": ["the system and the user"]}
    plain, scored = (
        llm.generate(["Hello"], SamplingParams(max_tokens=40, json_schema=form, logprobs=k))[0] for k in (-1, 0)
    )
    assert plain.text == scored.text == '"the system and the user"' and plain.logprobs is None
    assert scored.logprobs is not None and scored.token_ids == plain.token_ids
    assert [token.token_id for token in scored.logprobs] == scored.token_ids
    assert all(np.isfinite(token.logprob) and token.logprob < 0 and not token.top for token in scored.logprobs)


def test_prompts_have_log_probabilities(llm: LLM, theirs: Any, logprobs: Callable[[list[int]], Any]) -> None:
    ids = theirs("a model of the user")["input_ids"]
    (answer,) = llm.generate(["a model of the user"], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert answer.logprobs is None and answer.prompt_logprobs is not None
    expected = logprobs(ids)[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose([token.logprob for token in answer.prompt_logprobs], expected, atol=1e-4)
