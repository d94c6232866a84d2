"""Telling by a chat template how its model's answers hold thinking and tool calls."""

from batchinfer.text import reasoning, tool_calls
from batchinfer.text.chat import ChatError, ChatTemplate
from batchinfer.text.chat_arguments import Arguments
from batchinfer.text.tokenizer import Tokenizer

# Render chats with each of these: a template that knows thinking opens it, closes it, or tells the model its tags.
_TRIALS: tuple[Arguments, ...] = (
    {},
    {"enable_thinking": True},
    {"enable_thinking": False},
    {"thinking": True},
    {"thinking": False},
    {"thinking_budget": 0},
)


def reasoning_format_of(template: ChatTemplate, arguments: Arguments) -> str | None:
    """Return the name of the format in which the model of a chat template thinks; None if it writes no prompt, with
    `arguments` and with thinking on or off, from which that could be told."""
    texts = [text for trial in _TRIALS if (text := _prompt(template, {**arguments, **trial})) is not None]
    names = (name for name, form in reasoning.FORMATS.items() if form.is_written_by(template.source, texts))
    return next(names, None)


def closes_thinking(template: ChatTemplate, arguments: Arguments, name: str) -> bool:
    """Tell whether prompts with these arguments end with thinking that is over, in the reasoning format `name`."""
    prompt = _prompt(template, arguments)
    return prompt is not None and reasoning.FORMATS[name].is_closed_by(prompt)


def thinking_tags(tokenizer: Tokenizer, name: str | None) -> tuple[int, int]:
    """Return the ids of the tags that open and close thinking in a reasoning format, for --max-thinking-tokens.

    Raises `ValueError`, worded to follow the flag, if there is no format, or one whose tags are not one token each.
    """
    form = None if name is None else reasoning.FORMATS[name]
    if form is None:
        raise ValueError(
            "needs a --reasoning-parser, which the chat template does not show here; name it, or leave it out"
        )
    tokens = tokenizer.added_tokens
    if not isinstance(form, reasoning.Tags) or not {form.opening[0], form.closing[0]} <= tokens.keys():
        raise ValueError(f"needs thinking tags that are a token each, which those of {name} are not here; leave it out")
    return tokens[form.opening[0]], tokens[form.closing[0]]


def tool_format_of(template: ChatTemplate) -> str | None:
    """Return the name of the format in which the model of a chat template calls tools, or None."""
    names = (name for name, form in tool_calls.FORMATS.items() if form.is_written_by(template.source))
    return next(names, None)


def _prompt(template: ChatTemplate, arguments: Arguments) -> str | None:
    try:
        return template.render([{"role": "user", "content": "Hello"}], None, arguments)
    except ChatError:
        return None
