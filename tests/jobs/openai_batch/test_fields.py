"""The fields of a body: all of OpenAI's own are known, and what would change an answer is not passed over."""

import typing
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from batchinfer.engine.prompts import BadPrompt
from batchinfer.jobs.openai_batch.fields import HARMLESS, NEUTRAL, OF_ALL, OF_CHATS, OF_COMPLETIONS, check_fields

# A value of each field that would change the answer.
CHANGING: dict[str, Any] = {name: {"x": 1} for name in NEUTRAL} | {
    "n": 2,
    "echo": True,
    "stream": True,
}


@pytest.mark.parametrize("module", [chat_create_params, completion_create_params])
def test_all_fields_of_the_client_library_are_known(module: Any) -> None:
    own = typing.get_type_hints(module.CompletionCreateParamsBase).keys() | {"stream"}
    assert own - (OF_ALL | OF_CHATS | OF_COMPLETIONS | HARMLESS | NEUTRAL.keys()) <= {"best_of"}


def test_no_field_is_of_two_kinds() -> None:
    kinds: list[set[str]] = [OF_ALL, OF_CHATS, OF_COMPLETIONS, HARMLESS, {*NEUTRAL}]
    assert sum(map(len, kinds)) == len(set().union(*kinds))


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_field_that_is_not_supported_passes_where_it_changes_nothing(name: str) -> None:
    for value in (None, *NEUTRAL[name]):
        check_fields({name: value}, chat=True)
    with pytest.raises(BadPrompt) as raised:
        check_fields({name: CHANGING[name]}, chat=True)
    error = raised.value.row_error
    assert error.code == "unsupported_field" and error.message.startswith(f"{name} is ") and "; " in error.message


@pytest.mark.parametrize(
    ("body", "chat", "code"),
    [
        ({"temprature": 0.3}, True, "unknown_field"),
        ({"messages": []}, False, "unknown_field"),
        ({"prompt": "x"}, True, "unknown_field"),
        ({"logprobs": 0}, False, None),
        ({"top_logprobs": 2}, False, "unknown_field"),
        ({"best_of": 2, "n": 3}, False, "unsupported_field"),
        ({"best_of": 3, "n": 3}, False, None),
        ({"best_of": 1}, False, None),
        ({"add_special_tokens": True}, True, "unsupported_field"),
        ({"add_special_tokens": False}, False, "unsupported_field"),
        ({"add_special_tokens": False, "user": "u", "metadata": {"a": "b"}, "store": True}, True, None),
        ({"add_special_tokens": True, "service_tier": "flex", "top_k": 4}, False, None),
    ],
)
def test_fields_by_endpoint(body: dict[str, Any], chat: bool, code: str | None) -> None:
    if code is None:
        check_fields(body, chat)
        return
    with pytest.raises(BadPrompt) as raised:
        check_fields(body, chat)
    assert raised.value.row_error.code == code and next(iter(body)) in raised.value.row_error.message
