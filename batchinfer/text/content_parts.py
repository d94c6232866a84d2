"""Content that is a list of text parts: it stays a list for templates that read one, and else becomes one text."""

from collections.abc import Sequence
from typing import Any

from batchinfer.text.chat import ChatError, ChatTemplate, Message, Tool
from batchinfer.text.chat_arguments import Arguments

# Encloses a part's number in a trial. It is a noncharacter: no template strips it as a space, and Python escapes it
# where it prints a list. So a template that merely prints the list does not seem to read it.
_MARK = "\ufdd2"


def fit_parts(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Tool] | None, arguments: Arguments
) -> list[Message]:
    """Return the messages with their content in the form that the template reads.

    A list of parts {"type": "text", "text": ...} stays one if the template writes the text of each part. If it writes
    only some of them, it gets one part with all texts. Otherwise it gets the concatenation of the texts: with a list it
    would fail, print the list as Python does, or leave it out. Trying these messages tells the kinds apart.
    """
    if not any(isinstance(message.get("content"), list) for message in messages):
        return list(messages)
    written = _trial(template, messages, tools, arguments)
    return [
        {**message, "content": _fit(i, message["content"], written)}
        if isinstance(message.get("content"), list)
        else message
        for i, message in enumerate(messages)
    ]


def _trial(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Tool] | None, arguments: Arguments
) -> str:
    """Return what the template writes with a number in place of each part's text, or nothing if it fails."""
    numbered = []
    for i, message in enumerate(messages):
        if isinstance(message.get("content"), list):
            parts = [{**part, "text": _number(i, j)} for j, part in enumerate(message["content"])]
            message = {**message, "content": parts}
        numbered.append(message)
    try:
        return template.render(numbered, tools, arguments)
    except ChatError:
        return ""


def _number(message: int, part: int) -> str:
    return f"{_MARK}{message}.{part}{_MARK}"


def _fit(index: int, parts: list[dict[str, Any]], written: str) -> str | list[dict[str, Any]]:
    whole = "".join(part["text"] for part in parts)
    read = [_number(index, j) in written for j in range(len(parts))]
    if not any(read):
        return whole
    return parts if all(read) else [{**parts[0], "text": whole}]
