"""The flags for chat templates, thinking and tools; what they share with other jobs' flags is in `flags.py`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from batchinfer.errors import UsageError
from batchinfer.flag import Flag, Kind
from batchinfer.host.files import keys_once
from batchinfer.text import reasoning, tool_calls
from batchinfer.text.chat_arguments import problem_with


def arguments_of(flag: str, text: str) -> dict[str, Any]:
    """Parse the arguments of a chat template, a JSON object. Raises `UsageError` for anything else."""
    try:
        value: dict[str, Any] = json.loads(text, object_pairs_hook=keys_once)
        json.dumps(value, ensure_ascii=False).encode()  # raises if it holds half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{flag} is {text[:50]!r}; it must be a JSON object: {error}") from error
    if (problem := problem_with(value)) is not None:
        raise UsageError(f"{flag} {problem}")
    return value


@dataclass(frozen=True, kw_only=True)
class ChatFlags:
    """A user's choices for chats."""

    chat_template: Annotated[
        Path | None, Flag("Render chats with the Jinja template in this file, not with the model's own.", "Prompt")
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None,
        Flag(
            "Give the chat template these variables, as '{\"enable_thinking\": false}'.",
            "Prompt",
            kind=Kind("JSON", arguments_of),
            table=True,
        ),
    ] = None
    chat_template_kwargs_column: Annotated[
        str | None,
        Flag(
            "Give the chat template the variables in this column, which win over those of --chat-template-kwargs: "
            "structs, maps, or JSON objects as text.",
            "Prompt",
            "COLUMN",
        ),
    ] = None
    tools: Annotated[
        Path | None, Flag("Offer every chat the tools in this JSON file, a list of JSON schemas.", "Prompt")
    ] = None
    reasoning_parser: Annotated[
        str,
        Flag(
            "Put what a model thinks before it answers into a column 'reasoning', and only the answer into "
            "'generated_text'. 'auto' tells by the chat template whether and how the model thinks.",
            "Output",
            "NAME",
            choices=("auto", "none", *reasoning.FORMATS),
        ),
    ] = "auto"
    tool_parser: Annotated[
        str,
        Flag(
            "Put the tool calls of answers into a column 'tool_calls', each with name and arguments. 'auto' tells by "
            "the chat template how the model writes them, if tools are offered.",
            "Output",
            "NAME",
            choices=("auto", "none", *tool_calls.FORMATS),
        ),
    ] = "auto"

    @property
    def reasoning_format(self) -> str | None:
        """The format of thinking in answers, once 'auto' is resolved; None if it stays in their text."""
        return None if self.reasoning_parser in ("auto", "none") else self.reasoning_parser

    @property
    def tool_format(self) -> str | None:
        """The format of tool calls in answers, once 'auto' is resolved; None if they stay in their text."""
        return None if self.tool_parser in ("auto", "none") else self.tool_parser

    @property
    def parsed(self) -> tuple[str, ...]:
        """The columns of what is taken out of the answers' text."""
        formats = {"reasoning": self.reasoning_format, "tool_calls": self.tool_format}
        return tuple(name for name, form in formats.items() if form is not None)
