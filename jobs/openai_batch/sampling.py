"""How a request's answer is sampled: the job's sampling params, with what the request's body says itself."""

import json
from dataclasses import replace
from typing import Any

from batchinfer.engine.prompts import BadPrompt
from batchinfer.engine.request import RowError
from batchinfer.engine.sampling_params import STRUCTURES, SamplingParams
from batchinfer.engine.sampling_texts import in_token_ids, refuse_unknown_ids
from batchinfer.jobs.openai_batch.fields import LENGTHS, SAMPLING, STRUCTURE
from batchinfer.jobs.openai_batch.request import shown
from batchinfer.jobs.rows.schemas import problem_with
from batchinfer.text.grammars import refuse_tokenizer
from batchinfer.text.tokenizer import Tokenizer

ANY_OBJECT = '{"type": "object"}'
KEPT = 4096  # params of different bodies, since lines often share them


class RequestSampling:
    """Makes sampling params from bodies. What a body leaves out is as the job's flags say."""

    def __init__(self, base: SamplingParams, tokenizer: Tokenizer) -> None:
        self._base, self._tokenizer = base, tokenizer
        self._made: dict[str, SamplingParams | RowError] = {}
        hidden = {i for text in base.stop for name, i in tokenizer.unprinted_in(text).items() if name == text}
        # The base's tokens of --stop-token-ids alone: a body's own stop takes the place of --stop.
        self._stop_token_ids = tuple(i for i in base.stop_token_ids if i not in hidden)

    def of(self, body: dict[str, Any], parsed: tuple[str, ...]) -> SamplingParams:
        """Return the params of a body whose fields are known. Raises `BadPrompt`.

        `parsed` is what may be taken out of the answer; nothing is taken out of one with a form.
        """
        own = {name: body[name] for name in (*SAMPLING, *LENGTHS, *STRUCTURE) if body.get(name) is not None}
        key = json.dumps([parsed, own])
        if key not in self._made:
            if len(self._made) == KEPT:
                self._made.clear()
            try:
                self._made[key] = self._make(own, parsed)
            except BadPrompt as error:
                self._made[key] = error.row_error
        found = self._made[key]
        if isinstance(found, RowError):
            raise BadPrompt(found.code, found.message)
        return found

    def _make(self, body: dict[str, Any], parsed: tuple[str, ...]) -> SamplingParams:
        values = {name: body[name] for name in SAMPLING if name in body}
        if isinstance(values.get("stop"), str):
            values["stop"] = [values["stop"]]
        for name in ("stop", "bad_words"):
            texts = values.get(name, [])
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise BadPrompt("bad_value", f"{name} is {shown(texts)}; it must be a list of texts")
        if not isinstance(values.get("ignore_eos", False), bool):
            raise BadPrompt("bad_value", f"ignore_eos is {shown(values['ignore_eos'])}; it must be true or false")
        if values.get("top_k") == -1:  # how vLLM writes that it is off
            values["top_k"] = 0
        if "stop" in values:
            values.setdefault("stop_token_ids", self._stop_token_ids)
        lengths = [body[name] for name in LENGTHS if name in body]
        if lengths:
            values["max_tokens"] = lengths[0]
        if lengths[1:] not in ([], lengths[:1]):
            raise BadPrompt("bad_value", f"{' and '.join(LENGTHS)} differ; leave one of them out")
        values |= self._structure(body)
        try:
            params = replace(self._base, **values)
            refuse_unknown_ids(params, self._tokenizer.vocab_size)
        except (ValueError, OverflowError) as error:
            raise BadPrompt("bad_value", f"{error}; correct it, or leave it out") from error
        if {"min_tokens", "max_tokens"} & values.keys() and params.min_tokens > params.max_tokens:
            raise BadPrompt(
                "bad_value", f"min_tokens is {params.min_tokens}; it must be at most max_tokens, {params.max_tokens}"
            )
        params = replace(params, parsed=parsed if params.structure is None else ())
        return in_token_ids(params, self._tokenizer)[0]

    def _structure(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of sampling params for the form that a body asks for; none if it leaves that to the job."""
        if not any(name in body for name in STRUCTURE):
            return {}
        forms = [form for form in (_format_of(body), *_outputs_of(body)) if form is not None]
        if len(forms) > 1:
            raise BadPrompt("bad_value", f"{' and '.join(STRUCTURE)} ask for several forms; leave all but one out")
        values: dict[str, Any] = dict.fromkeys(STRUCTURES)
        if not forms:
            return values
        try:
            refuse_tokenizer(self._tokenizer)
        except ValueError as error:
            raise BadPrompt("unsupported_field", f"no form can be followed with this tokenizer: {error}") from error
        if problem := problem_with(forms[0]):
            raise BadPrompt("bad_schema", f"the {forms[0][0].replace('_', ' ')} {problem}")
        # A form leaves no room for thinking.
        return values | dict([forms[0]]) | {"max_thinking_tokens": 0, "thinking_tags": ()}


def _format_of(body: dict[str, Any]) -> tuple[str, str] | None:
    """Return the form that `response_format` names; None for free text."""
    asked = body.get("response_format", {"type": "text"})
    kind = asked.get("type") if isinstance(asked, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return "json_schema", ANY_OBJECT
    described = asked.get("json_schema") if kind == "json_schema" else None
    schema = described.get("schema") if isinstance(described, dict) else None
    if kind != "json_schema":
        raise BadPrompt(
            "bad_value", f"response_format has the type {shown(kind)}; it must be text, json_object or json_schema"
        )
    if not isinstance(schema, dict):
        raise BadPrompt("bad_value", "response_format has no json_schema.schema that is an object; give one")
    return "json_schema", json.dumps(schema)


def _outputs_of(body: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the forms that `structured_outputs` names, as vLLM has them."""
    asked = body.get("structured_outputs", {})
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
