"""Log-probabilities in responses: those of the job's columns, in the forms of OpenAI's types."""

from typing import Any

from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.completion_choice import Logprobs

from batchinfer.jobs.openai_batch.logprobs import of_chat, of_completion


def token(text: str, logprob: float | None, **top: float | None) -> dict[str, Any]:
    others = [{"token": name, "token_id": 1, "logprob": value} for name, value in top.items()]
    return {"token": text, "token_id": 0, "logprob": logprob, "top": others}


ENTRIES = [token(" a", -0.5, **{" a": -0.5, "b": -2.0}), token("é", None), token("\ufffd", -1.5, **{"\ufffd": -0.25})]


def test_a_chat_has_a_list_of_tokens_with_their_bytes() -> None:
    found = ChoiceLogprobs.model_validate(of_chat(ENTRIES))
    assert found.content is not None and found.to_dict() == of_chat(ENTRIES)
    first, second, third = found.content
    assert [(t.token, t.logprob, t.bytes) for t in first.top_logprobs] == [(" a", -0.5, [32, 97]), ("b", -2.0, [98])]
    assert (second.logprob, second.bytes, second.top_logprobs) == (-9999.0, [195, 169], [])
    assert (third.token, third.bytes) == ("\ufffd", None)


def test_a_completion_has_lists_of_each_kind() -> None:
    found = Logprobs.model_validate(of_completion(ENTRIES))
    assert found.to_dict() == of_completion(ENTRIES)
    assert found.tokens == [" a", "é", "\ufffd"] and found.text_offset == [0, 2, 3]
    assert found.token_logprobs == [-0.5, -9999.0, -1.5]
    # Another token with the same text is likelier than the one that was chosen.
    assert found.top_logprobs == [{" a": -0.5, "b": -2.0}, {"é": -9999.0}, {"\ufffd": -0.25}]


def test_none_are_none() -> None:
    assert of_chat(None) is of_completion(None) is None
    assert of_completion([]) == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
