"""Files of requests in the format of OpenAI's batch API, and their answers as OpenAI's client library reads them."""

import json
from pathlib import Path
from typing import Any

from openai.types import BatchError, Completion, CompletionUsage
from openai.types.chat import ChatCompletion
from openai.types.shared import ErrorObject

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def request(custom_id: Any, url: str = CHAT, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def chat(custom_id: Any, content: Any = "Hello", **body: Any) -> dict[str, Any]:
    return request(custom_id, CHAT, messages=[{"role": "user", "content": content}], **body)


def completion(custom_id: Any, prompt: Any = "Hello", **body: Any) -> dict[str, Any]:
    return request(custom_id, COMPLETIONS, prompt=prompt, **body)


def write_batch(path: Path, *lines: Any) -> Path:
    """Lines that are bytes stay as they are; others are written as JSON."""
    path.write_bytes(b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines))
    return path


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def parsed(line: dict[str, Any]) -> ChatCompletion | Completion | ErrorObject:
    """What the types of OpenAI's client library make of an output line; they refuse a wrong one."""
    assert line.keys() == {"id", "custom_id", "response", "error"}
    response = line["response"]
    assert response.keys() == {"status_code", "request_id", "body"} and response["request_id"].startswith("req_")
    body = response["body"]
    if response["status_code"] != 200:
        error = ErrorObject.model_validate(body["error"])
        assert BatchError.model_validate(line["error"]).code == error.code and line["error"]["message"] == error.message
        return error
    assert line["error"] is None
    kind = {"chat.completion": ChatCompletion, "text_completion": Completion}[body["object"]]
    found: ChatCompletion | Completion = kind.model_validate(body)
    assert isinstance(found.usage, CompletionUsage)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.to_dict().keys() == body.keys()
    return found


def refused(line: dict[str, Any]) -> tuple[str | None, str]:
    """(code, message) of a line with an error."""
    found = parsed(line)
    assert isinstance(found, ErrorObject), line
    return found.code, found.message


def answered(line: dict[str, Any]) -> Any:
    """The only choice of a line with an answer."""
    found = parsed(line)
    assert not isinstance(found, ErrorObject), line
    (choice,) = found.choices
    return choice
