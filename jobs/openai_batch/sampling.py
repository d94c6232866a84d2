"""How a request's answer is sampled: as the job's flags say, with what the request's body says itself."""

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

from batchinfer.engine.prompts import BadPrompt
from batchinfer.engine.sampling_params import MOST_LOGPROBS, STRUCTURES, SamplingParams
from batchinfer.jobs.openai_batch.fields import LENGTHS, SAMPLING, STRUCTURE
from batchinfer.jobs.openai_batch.request import shown
from batchinfer.jobs.rows.sampling import KEPT, RowSampling, RowsSampling
from batchinfer.jobs.spec import JobSpec
from batchinfer.text.tokenizer import Tokenizer

ANY_OBJECT = '{"type": "object"}'


class RequestSampling:
    """Reads how the answers to requests are sampled."""

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer) -> None:
        self._rows = RowsSampling(spec, tokenizer)

    def of(self, body: dict[str, Any], chat: bool, parsed: tuple[str, ...]) -> RowSampling:
        """Return how the answer to a chat's or a completion's body, whose fields are known, is sampled. Raises
        `BadPrompt`.

        `parsed` is what may be taken out of the answer; nothing is taken out of one with a form.
        """
        found = self._rows.read(_sampling_of(body) | _structure_of(body) | _logprobs_of(body, chat))
        params = _reading(found.params, parsed if found.params.structure is None else ())
        return replace(found, params=params)


@lru_cache(KEPT)
def _reading(params: SamplingParams, parsed: tuple[str, ...]) -> SamplingParams:
    return replace(params, parsed=parsed)


def _sampling_of(body: dict[str, Any]) -> dict[str, Any]:
    """Return what a body says, without forms, as a row's sampling params have it."""
    given = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    for name in ("stop", "bad_words"):
        texts = given.get(name, [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise BadPrompt("bad_value", f"{name} is {shown(texts)}; it must be a list of texts")
    if not isinstance(given.get("ignore_eos", False), bool):
        raise BadPrompt("bad_value", f"ignore_eos is {shown(given['ignore_eos'])}; it must be true or false")
    if given.get("top_k") == -1:  # how vLLM writes that it is off
        given["top_k"] = 0
    lengths = [body[name] for name in LENGTHS if body.get(name) is not None]
    if lengths:
        given["max_tokens"] = lengths[0]
    if lengths[1:] not in ([], lengths[:1]):
        raise BadPrompt("bad_value", f"{' and '.join(LENGTHS)} differ; leave one of them out")
    return given


def _logprobs_of(body: dict[str, Any], chat: bool) -> dict[str, Any]:
    """Return how many likeliest tokens a body asks for beside each token; none if it asks for no log-probabilities."""
    asked, likeliest = body.get("logprobs"), body.get("top_logprobs")
    if not chat:
        return {} if asked is None else {"logprobs": _count("logprobs", asked)}
    if asked not in (None, False, True):
        raise BadPrompt("bad_value", f"logprobs is {shown(asked)}; it must be true or false")
    if not asked and likeliest:
        raise BadPrompt("bad_value", f"top_logprobs is {shown(likeliest)}, and logprobs is not true; give both")
    return {"logprobs": _count("top_logprobs", likeliest or 0)} if asked else {}


def _count(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MOST_LOGPROBS:
        raise BadPrompt("bad_value", f"{name} is {shown(value)}; it must be from 0 to {MOST_LOGPROBS}")
    return value


def _structure_of(body: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of sampling params for the form that a body asks for; none if it leaves that to the job."""
    if all(body.get(name) is None for name in STRUCTURE):
        return {}
    forms = [form for form in (_format_of(body), *_outputs_of(body)) if form is not None]
    if len(forms) > 1:
        raise BadPrompt("bad_value", f"{' and '.join(STRUCTURE)} ask for several forms; leave all but one out")
    # A form leaves no room for thinking.
    return dict.fromkeys(STRUCTURES) | dict(forms) | ({"max_thinking_tokens": 0} if forms else {})


def _format_of(body: dict[str, Any]) -> tuple[str, str] | None:
    """Return the form that `response_format` names; None for free text."""
    asked = body.get("response_format")
    if asked is None:
        return None
    kind = asked.get("type") if isinstance(asked, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return "json_schema", ANY_OBJECT
    if kind != "json_schema":
        raise BadPrompt(
            "bad_value", f"response_format has the type {shown(kind)}; it must be text, json_object or json_schema"
        )
    described = asked.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise BadPrompt("bad_value", "response_format has no json_schema.schema that is an object; give one")
    return "json_schema", json.dumps(schema)


def _outputs_of(body: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the forms that `structured_outputs` names, as vLLM has them."""
    asked = body.get("structured_outputs")
    if asked is None:
        return []
    if not isinstance(asked, dict):
        raise BadPrompt("bad_value", f"structured_outputs is {shown(asked)}; it must be an object")
    found = []
    for name, value in asked.items():
        if value is None or value is False:
            continue
        if name == "json" and isinstance(value, str | dict):
            found.append(("json_schema", value if isinstance(value, str) else json.dumps(value)))
        elif name == "json_object" and value is True:
            found.append(("json_schema", ANY_OBJECT))
        elif name in ("regex", "grammar") and isinstance(value, str):
            found.append((name, value))
        elif name == "choice" and isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
            found.append(("grammar", f"start: {alternatives}"))
        else:
            raise BadPrompt(
                "unsupported_field",
                f"structured_outputs has {shown(name)}: {shown(value)}, which is not supported; give json, "
                "json_object, regex, choice or grammar",
            )
    return found
