"""`Request`: what a line of a batch file asks for, checked as far as its envelope goes.

The lines' form: https://platform.openai.com/docs/api-reference/batch/request-input.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from batchinfer.engine.prompts import BadPrompt
from batchinfer.jobs.tables.json_lines import parse
from batchinfer.jobs.tables.lines import MAX_LINE_BYTES

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
POOLING = ("embeddings", "score", "rerank", "pooling", "classify")  # what the last part of such a model's url is
FIELDS = ("custom_id", "method", "url", "body")
MOST_SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class Request:
    """A line whose envelope is right; `url` is one of the two that are answered."""

    custom_id: str
    url: str
    body: dict[str, Any]

    @property
    def chat(self) -> bool:
        """True if this asks for a chat completion."""
        return self.url == CHAT


def read_request(line: bytes | None, models: Sequence[str] | None) -> Request:
    """Return the request on a line; None is a line that was too long to be read.

    `models` are the names by which requests may ask for the model; None: they may ask for any. Raises `BadPrompt`.
    """
    value = _read(line)
    for name in FIELDS:
        if value.get(name) is None:
            raise BadPrompt("bad_line", f"it has no {name!r}; expected {', '.join(FIELDS)}")
    if unknown := sorted(value.keys() - {*FIELDS}):
        raise BadPrompt("bad_line", f"it has a field {shown(unknown[0])}, which is not known; leave it out")
    custom_id, method, url, body = (value[name] for name in FIELDS)
    if not isinstance(custom_id, str) or not custom_id:
        raise BadPrompt("bad_line", f"custom_id is {shown(custom_id)}; it must be a text of one character or more")
    if method != "POST":
        raise BadPrompt("bad_line", f"method is {shown(method)}; it must be POST")
    if not isinstance(body, dict):
        raise BadPrompt("bad_line", f"body is {shown(body)}; it must be an object")
    _check_url(url)
    if models is not None and (model := body.get("model")) is not None and model not in models:
        raise BadPrompt(
            "model_mismatch",
            f"model is {shown(model)}, and this job runs {models[0]!r}; correct it, or give --any-model",
        )
    return Request(custom_id, url, body)


def custom_id_of(line: bytes | None) -> str | None:
    """Return the custom_id of a line, also of one that is otherwise wrong; None if there is none."""
    try:
        found = _read(line).get("custom_id")
    except BadPrompt:
        return None
    return found if isinstance(found, str) and found else None


def shown(value: Any) -> str:
    """Write a value for a message, as JSON; of a long one the beginning."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _read(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise BadPrompt("too_large", f"it is longer than {MAX_LINE_BYTES} bytes; shorten it")
    try:
        line.decode()
        value = parse(line)
        if b"\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise BadPrompt("invalid_utf8", f"it is not UTF-8 at byte {error.start + 1}") from error
    except UnicodeEncodeError as error:
        raise BadPrompt("invalid_utf8", "it holds half of a surrogate pair") from error
    except (ValueError, RecursionError) as error:
        at = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else f": {error}"
        raise BadPrompt("invalid_json_line", f"it is not JSON{at}") from error
    if not isinstance(value, dict):
        raise BadPrompt("bad_line", f"it holds a {type(value).__name__}; expected an object")
    return value


def _check_url(url: Any) -> None:
    if url in (CHAT, COMPLETIONS):
        return
    last = re.split("[/?]", url.rstrip("/"))[-1] if isinstance(url, str) else ""
    asks = f"asks for what a pooling model computes ({last}), and this job generates text" if last in POOLING else ""
    raise BadPrompt("unsupported_url", f"url {shown(url)} {asks or 'is not answered'}; give {CHAT} or {COMPLETIONS}")
