"""Chat templates: turning messages into a prompt's text with the checkpoint's own Jinja template, in a sandbox."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.nodes import Name

from batchinfer.host.limits import limited
from batchinfer.text.sandbox import Sandbox

Message = Mapping[str, Any]  # at least "role", and "content" or "tool_calls"
Tool = Mapping[str, Any]  # a function that the model may call, as a JSON schema

REASONING = ("reasoning_content", "thinking", "reasoning")  # keys for the reasoning before an answer, by precedence

# These enclose a control token's text in a message. Both are Unicode noncharacters, which proper text never contains.
MARK_START, MARK_END = "\ufdd0", "\ufdd1"
MAX_RENDERED = 5 << 20  # characters
MAX_SOURCE = 1 << 18  # characters
MAX_SECONDS = 10.0  # of processor time, for one conversation
MAX_MEMORY = 1 << 30  # bytes, for one conversation


class ChatError(Exception):
    """The template cannot render these messages. The error's text quotes nothing from them."""


class TemplateRefused(ChatError):
    """The template took too much time or memory, or tried to leave its sandbox."""


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled chat template and the special tokens that it may refer to by name."""

    source: str
    template: jinja2.Template
    variables: Mapping[str, str]  # bos_token, eos_token, ...
    moment: datetime  # local time that the template takes for now
    tells_time: bool  # the template may write `moment`
    reads_tools: bool

    @staticmethod
    def compile(source: str, variables: Mapping[str, str], moment: datetime | None = None) -> "ChatTemplate":
        """Compile a template, which takes `moment` for now, or the moment of this call if none is given.

        Raises `ValueError` with the line of a syntax error or the limit that was exceeded.
        """
        moment = moment or datetime.now()
        if len(source) > MAX_SOURCE:
            raise ValueError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are allowed")
        try:
            with limited(MAX_SECONDS, MAX_MEMORY):
                sandbox = Sandbox(moment)
                tree = sandbox.parse(source)
                names = {name.name for name in tree.find_all(Name)}
                template = sandbox.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template has a syntax error on line {error.lineno}: {error.message}") from error
        except Exception as error:  # for example nesting that is too deep, or a constant that cannot be computed
            raise ValueError(f"the chat template cannot be compiled ({type(error).__name__})") from error
        return ChatTemplate(source, template, variables, moment, "strftime_now" in names, "tools" in names)

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> str:
        """Return the prompt's text, up to where the assistant's turn begins.

        A message's keys whose value is None are left out. Its reasoning is there under both names that templates read.

        Raises `ChatError` if the template raises anything or writes more than `MAX_RENDERED` characters. Raises
        `TemplateRefused` if it takes more than `MAX_SECONDS` (checked in the main thread only) or `MAX_MEMORY`, or
        tries to leave the sandbox.
        """
        present = [_present(message) for message in messages]
        try:
            with limited(MAX_SECONDS, MAX_MEMORY):
                return self._write(present, tools)
        except ChatError:
            raise
        except TimeoutError as error:
            raise TemplateRefused(f"the chat template {error}") from error
        except MemoryError as error:
            raise TemplateRefused(f"the chat template took more than {MAX_MEMORY >> 20} MiB") from error
        except SecurityError as error:
            raise TemplateRefused("the chat template did what its sandbox forbids") from error
        except Exception as error:  # a template is a program: it may fail in any way
            raise ChatError(self._reason(error)) from error

    def _write(self, messages: list[Message], tools: Sequence[Tool] | None) -> str:
        written, size = [], 0
        for text in self.template.generate(
            **self.variables, messages=messages, tools=tools, documents=None, add_generation_prompt=True
        ):
            written.append(text)
            size += len(text)
            if size > MAX_RENDERED:
                raise ChatError(f"the chat template wrote more than {MAX_RENDERED} characters")
        return "".join(written)

    def _reason(self, error: Exception) -> str:
        # An error text that occurs in the template's source quotes nothing from the prompt; any other text might.
        known = isinstance(error, jinja2.TemplateError) and str(error) and str(error) in self.source
        return f"the chat template raised {error if known else type(error).__name__}"


def _present(message: Message) -> Message:
    present = {key: value for key, value in message.items() if value is not None}
    found = [present[key] for key in REASONING if key in present]
    return {"thinking": found[0], **present, "reasoning_content": found[0]} if found else present


def mark(value: Any, control_tokens: re.Pattern[str]) -> Any:
    """Return the messages with marks around each control token's text in their strings. Dictionary keys are unchanged.

    Raises `ChatError` if a string contains a mark itself.
    """
    if isinstance(value, str):
        if MARK_START in value or MARK_END in value:
            raise ChatError("a message holds U+FDD0 or U+FDD1, noncharacters that are reserved for internal use")
        return control_tokens.sub(rf"{MARK_START}\g<0>{MARK_END}", value)
    if isinstance(value, Mapping):
        return {key: mark(item, control_tokens) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mark(item, control_tokens) for item in value]
    return value
