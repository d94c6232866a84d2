"""Finding the tool calls in answers, in the formats that models write them.

A call that does not parse stays a part of the answer. The formats are those of the models' chat templates: Hermes and
Qwen, Llama 3.1 and later (https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/), Mistral
(https://github.com/mistralai/mistral-common), and gpt-oss (`harmony.py`).
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from batchinfer.text import harmony
from batchinfer.text.harmony import messages_of
from batchinfer.text.pieces import Piece, plain

_NAMED = re.compile(r"\s*([\w.:-]+)\s*(\{.*)", re.DOTALL)  # a function's name and its arguments


class ToolCall(NamedTuple):
    """A call of a function."""

    name: str
    arguments: str  # a JSON object


class Found(NamedTuple):
    """What is in an answer."""

    calls: list[ToolCall]
    rest: list[Piece]
    failed: bool  # it has text that looks like a call and does not parse, which is in `rest`


class ToolCallFormat(Protocol):
    """How answers of some models hold tool calls."""

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts at which answers are cut."""

    def find(self, pieces: list[Piece]) -> Found:
        """Find the calls in an answer."""

    def is_written_by(self, source: str) -> bool:
        """Tell whether a chat template writes earlier calls, or asks for calls, in this format."""


class Hermes:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, once for each call."""

    marks = ("<tool_call>", "</tool_call>")

    def find(self, pieces: list[Piece]) -> Found:
        calls: list[ToolCall] = []
        rest: list[Piece] = []
        failed = taken = False
        for piece in pieces:
            if piece.mark == "<tool_call>":
                found = _calls_in(piece.text)
                calls += found
                taken = bool(found)
                failed |= not taken
                rest += [] if taken else [piece]
            elif piece.mark == "</tool_call>" and taken:
                rest.append(plain(piece.text))
                taken = False
            else:
                rest.append(piece)
        return Found(calls, rest, failed)

    def is_written_by(self, source: str) -> bool:
        others = ("<function=", "<arg_key>")  # arguments as XML between the same tags: Qwen3-Coder and GLM
        return "<tool_call>" in source and not any(other in source for other in others)


class Llama3:
    """{"name": ..., "parameters": {...}}, alone or behind <|python_tag|>, with semicolons between several calls."""

    marks = ("<|python_tag|>",)

    def find(self, pieces: list[Piece]) -> Found:
        calls: list[ToolCall] = []
        rest: list[Piece] = []
        failed = False
        for piece in pieces:
            wanted = piece.mark or self._looks_like_calls(piece.text)
            found = _calls_in(piece.text, ("parameters", "arguments")) if wanted else []
            calls += found
            failed |= bool(wanted and not found)
            rest += [] if found else [piece]
        return Found(calls, rest, failed)

    def is_written_by(self, source: str) -> bool:
        return "<|python_tag|>" in source or ("<|start_header_id|>" in source and '"parameters": ' in source)

    def _looks_like_calls(self, text: str) -> bool:
        keys = '"parameters"' in text or '"arguments"' in text
        return text.lstrip()[:1] in ("{", "[") and '"name"' in text and keys


class Mistral:
    """[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]name[ARGS]{...} once for each call."""

    marks = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")

    def find(self, pieces: list[Piece]) -> Found:
        calls: list[ToolCall] = []
        rest: list[Piece] = []
        failed = False
        for group in self._groups(pieces):
            found = self._calls(group) if group[0].mark == "[TOOL_CALLS]" else []
            calls += found
            failed |= group[0].mark == "[TOOL_CALLS]" and not found
            rest += [] if found else group
        return Found(calls, rest, failed)

    def is_written_by(self, source: str) -> bool:
        return "[TOOL_CALLS]" in source

    def _groups(self, pieces: list[Piece]) -> Iterator[list[Piece]]:
        """Yield the pieces of each call together."""
        current: list[Piece] = []
        for piece in pieces:
            if current and piece.mark not in ("[CALL_ID]", "[ARGS]"):
                yield current
                current = []
            current.append(piece)
        if current:
            yield current

    def _calls(self, group: list[Piece]) -> list[ToolCall]:
        first, last = group[0], group[-1]
        if last.mark == "[ARGS]":
            return _call(first.text.strip(), last.text)
        named = _NAMED.fullmatch(first.text)
        return _call(named[1], named[2]) if named else _calls_in(first.text)


class HarmonyCalls:
    """Messages to functions, as gpt-oss writes them."""

    marks = harmony.MARKS

    def find(self, pieces: list[Piece]) -> Found:
        calls: list[ToolCall] = []
        rest: list[Piece] = []
        failed = False
        for message in messages_of(pieces):
            found = _call(message.recipient.removeprefix("functions."), message.text) if message.recipient else []
            calls += found
            failed |= bool(message.recipient and not found)
            rest += [] if found else message.pieces
        return Found(calls, rest, failed)

    def is_written_by(self, source: str) -> bool:
        return "<|channel|>" in source and "<|call|>" in source


FORMATS: dict[str, ToolCallFormat] = {
    "harmony": HarmonyCalls(),
    "mistral": Mistral(),
    "llama3": Llama3(),
    "hermes": Hermes(),
}


def _calls_in(text: str, keys: tuple[str, ...] = ("arguments", "parameters", "")) -> list[ToolCall]:
    """Return the calls in a text that is JSON: an object, a list of objects, or objects with semicolons between them.

    An object has its arguments under one of `keys`; "" stands for none at all. Returns none unless all are calls.
    """
    decoder = json.JSONDecoder(parse_constant=_refuse)
    values: list[Any] = []
    try:
        while text := text.strip().lstrip(";").strip():
            value, end = decoder.raw_decode(text)
            values += value if isinstance(value, list) else [value]
            text = text[end:]
    except (ValueError, RecursionError):
        return []
    calls: list[ToolCall] = []
    for value in values:
        key = next((key for key in keys if isinstance(value, dict) and (key in value or not key)), None)
        found = [] if key is None else _call(value.get("name"), value.get(key, {}))
        if not found:
            return []
        calls += found
    return calls


def _call(name: Any, arguments: Any) -> list[ToolCall]:
    """Return the call of a function, whose arguments are an object or its JSON; none if they are not."""
    try:
        value = json.loads(arguments, parse_constant=_refuse) if isinstance(arguments, str) else arguments
        if not isinstance(name, str) or not name or not isinstance(value, dict):
            return []
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
        f"{name}{written}".encode()  # raises for half of a surrogate pair
    except (ValueError, RecursionError):
        return []
    return [ToolCall(name, written)]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
