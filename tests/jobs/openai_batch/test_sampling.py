"""Sampling by request: what a body says wins over the job's flags, and what it says wrongly is named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_models import CHATML, save

from batchinfer.engine.prompts import BadPrompt
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_texts import in_token_ids
from batchinfer.jobs.openai_batch.sampling import RequestSampling
from batchinfer.jobs.spec import JobSpec
from batchinfer.text.tokenizer import Tokenizer

BASE = SamplingParams(max_tokens=50, temperature=0.7, stop=("END", "</s>"), stop_token_ids=(9,), top_k=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = save(tmp_path_factory.mktemp("model"), CHATML)
    (folder / "config.json").write_text("{}")
    return Tokenizer.load(folder)


def job(sampling: SamplingParams) -> JobSpec:
    return JobSpec(inputs=(Path("i.jsonl"),), output=Path("o.jsonl"), model="m", openai_batch=True, sampling=sampling)


@pytest.fixture(scope="module")
def sampling(tokenizer: Tokenizer) -> RequestSampling:
    return RequestSampling(job(in_token_ids(BASE, tokenizer)[0]), tokenizer)


def params(
    sampling: RequestSampling, body: dict[str, Any], parsed: tuple[str, ...] = (), chat: bool = True
) -> SamplingParams:
    return sampling.of(body, chat, parsed).params


def test_what_a_body_leaves_out_is_as_the_job_says(sampling: RequestSampling, tokenizer: Tokenizer) -> None:
    base = in_token_ids(BASE, tokenizer)[0]
    assert params(sampling, {"model": "m", "temperature": None, "user": "u"}) == replace(base, parsed=())
    assert params(sampling, {}, ("reasoning",)).parsed == ("reasoning",)
    assert [sampling.of(body, False, ()).n for body in ({}, {"n": 3})] == [1, 3]
    for body, chat, logprobs in (
        ({}, True, -1), ({"logprobs": False, "top_logprobs": 0}, True, -1), ({"logprobs": True}, True, 0),
        ({"logprobs": True, "top_logprobs": 20}, True, 20), ({"logprobs": 3}, False, 3), ({"logprobs": 0}, False, 0),
    ):  # fmt: skip
        assert params(sampling, body, chat=chat).logprobs == logprobs
    own = {"temperature": 0, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1}
    more = {"repetition_penalty": 1.5, "min_tokens": 2, "ignore_eos": True, "bad_words": ["never"]}
    expected = in_token_ids(replace(base, **{**own, **more, "top_k": 0, "parsed": ()}), tokenizer)[0]
    assert params(sampling, own | more) == expected and expected.bad_words_ids


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 8}, 8),
        ({"max_tokens": 9, "max_completion_tokens": 9}, 9),
        ({"max_tokens": None, "max_completion_tokens": 3}, 3),
    ],
)
def test_the_length_has_two_names(sampling: RequestSampling, body: dict[str, Any], tokens: int) -> None:
    assert params(sampling, body).max_tokens == tokens


def test_stops_of_a_body_take_the_place_of_the_job_s(sampling: RequestSampling, tokenizer: Tokenizer) -> None:
    end, turn = (tokenizer.added_tokens[text] for text in ("</s>", "<|im_end|>"))
    assert params(sampling, {}).stop_token_ids == (9, end)
    for stop in ("a", ["a"], ["a", "<|im_end|>"]):
        found = params(sampling, {"stop": stop})
        assert found.stop == ((stop,) if isinstance(stop, str) else tuple(stop))
        assert found.stop_token_ids == ((9, turn) if len(stop) == 2 else (9,))
    assert params(sampling, {"stop": ["a"], "stop_token_ids": [4]}).stop_token_ids == (4,)
    assert params(sampling, {"stop": []}).stop == ()


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("body", "structure"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("json_schema", {"type": "object"})),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            ("json_schema", SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, ("json_schema", SCHEMA)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}, ("json_schema", SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, ("json_schema", {"type": "object"})),
        ({"structured_outputs": {"regex": "[a-c]+"}}, ("regex", "[a-c]+")),
        ({"structured_outputs": {"grammar": "start: /a+/"}}, ("grammar", "start: /a+/")),
        (
            {"structured_outputs": {"choice": ['ja "oder"', "nein\n", "é|x"]}},
            ("grammar", 'start: "ja \\"oder\\"" | "nein\\n" | "é|x"'),
        ),
    ],
)
def test_forms(tokenizer: Tokenizer, body: dict[str, Any], structure: tuple[str, Any] | None) -> None:
    sampling = RequestSampling(job(SamplingParams(max_thinking_tokens=3, thinking_tags=(1, 2))), tokenizer)
    chosen = params(sampling, body, ("reasoning",))
    found = chosen.structure
    assert (found and (found[0], json.loads(found[1]) if found[0] == "json_schema" else found[1])) == structure
    assert (chosen.max_thinking_tokens == 0) == (chosen.parsed == ()) == (structure is not None)
    sampling = RequestSampling(job(SamplingParams(regex="x")), tokenizer)
    assert params(sampling, body).structure == found and params(sampling, {}).structure == ("regex", "x")


def error_of(sampling: RequestSampling, body: dict[str, Any]) -> tuple[str, str]:
    for _ in range(2):  # the second time the error is remembered
        with pytest.raises(BadPrompt) as raised:
            params(sampling, body)
    return raised.value.row_error.code, raised.value.row_error.message


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"temperature": -1}, "temperature is -1; it must be from 0 to 100"),
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 10**400}, "top_p"),
        ({"top_k": -2}, "top_k is -2"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"max_completion_tokens": [1]}, "max_tokens is [1]"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens and max_completion_tokens differ"),
        ({"min_tokens": 51}, "min_tokens is 51; it must be at most max_tokens, 50"),
        ({"stop": 5}, "stop is 5; it must be a list of texts"),
        ({"stop": [""]}, "stop is an empty string"),
        ({"stop": ["a"] * 65}, "stop is 65 strings"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids is 1000000"),
        ({"stop_token_ids": "9"}, "stop_token_ids is '9'"),
        ({"bad_words": "never"}, "bad_words"),
        ({"n": 0}, "n is 0; it must be from 1 to 128"),
        ({"n": 1.0}, "n is 1.0; it must be a whole number"),
        ({"ignore_eos": 1}, "ignore_eos is 1"),
        ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos is True"),
        ({"response_format": "json"}, "response_format has the type null"),
        ({"response_format": {"type": "structural_tag"}}, "structural_tag"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "json_schema.schema"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "several forms"),
        ({"structured_outputs": {"regex": "a", "grammar": "start: /a/"}}, "several forms"),
        ({"structured_outputs": []}, "structured_outputs is []"),
    ],
)
def test_wrong_values_are_named(sampling: RequestSampling, body: dict[str, Any], named: str) -> None:
    code, message = error_of(sampling, body)
    assert code in ("bad_value", "bad_sampling_params") and named in message


@pytest.mark.parametrize(
    ("body", "code", "named"),
    [
        ({"structured_outputs": {"structural_tag": "x"}}, "unsupported_field", "structural_tag"),
        ({"structured_outputs": {"choice": []}}, "unsupported_field", "choice"),
        ({"structured_outputs": {"regex": "("}}, "bad_sampling_params", "regex "),
        ({"structured_outputs": {"json": "{"}}, "bad_sampling_params", "json_schema "),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            "bad_sampling_params",
            "type",
        ),
    ],
)
def test_wrong_forms_are_named(sampling: RequestSampling, body: dict[str, Any], code: str, named: str) -> None:
    found, message = error_of(sampling, body)
    assert found == code and named in message
