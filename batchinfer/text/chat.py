"""Chat templates: messages in, the text of a prompt out, by the checkpoint's own Jinja template in a sandbox."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from batchinfer.host.limits import limited
from batchinfer.text.sandbox import Sandbox

Message = Mapping[str, Any]  # at least "role" and "content"

# Two Unicode noncharacters, which text for interchange never holds, enclose a control token's text in a message.
MARK_START, MARK_END = "\ufdd0", "\ufdd1"
MAX_RENDERED = 5 << 20  # characters
MAX_SOURCE = 1 << 18  # characters
MAX_SECONDS = 10.0  # of processor time, for one conversation
MAX_MEMORY = 1 << 30  # bytes, for one conversation


class ChatError(Exception):
    """These messages do not go through this template; the text holds nothing of the messages."""


class TemplateRefused(ChatError):
    """The template did what none may do: it took too much time or memory, or left its sandbox."""


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled chat template and the names of special tokens that it may use."""

    source: str
    template: jinja2.Template
    variables: Mapping[str, str]  # bos_token, eos_token, ...

    @staticmethod
    def compile(source: str, variables: Mapping[str, str]) -> "ChatTemplate":
        """Raises `ValueError` with the line where the template's syntax is wrong, or with the bound that it breaks."""
        if len(source) > MAX_SOURCE:
            raise ValueError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are taken")
        try:
            with limited(MAX_SECONDS, MAX_MEMORY):
                template = Sandbox().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template has a syntax error on line {error.lineno}: {error.message}") from error
        except Exception as error:  # nested too deep, or constants that cannot be computed
            raise ValueError(f"the chat template cannot be compiled ({type(error).__name__})") from error
        return ChatTemplate(source, template, variables)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt's text, up to where the assistant's turn begins. Keys that are None are left out.

        Raises `ChatError` if the template raises, whatever it raises, or writes more than `MAX_RENDERED` characters; a
        `TemplateRefused` if it takes more than `MAX_SECONDS` (watched in the main thread only) or `MAX_MEMORY`.
        """
        present: list[Message] = [
            {key: value for key, value in message.items() if value is not None} for message in messages
        ]
        try:
            with limited(MAX_SECONDS, MAX_MEMORY):
                return self._write(present)
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

    def _write(self, messages: list[Message]) -> str:
        pieces, size = [], 0
        for piece in self.template.generate(
            **self.variables, messages=messages, tools=None, documents=None, add_generation_prompt=True
        ):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_RENDERED:
                raise ChatError(f"the chat template wrote more than {MAX_RENDERED} characters")
        return "".join(pieces)

    def _reason(self, error: Exception) -> str:
        # A message that stands in the template holds nothing of the prompt; any other might.
        known = isinstance(error, jinja2.TemplateError) and str(error) and str(error) in self.source
        return f"the chat template raised {error if known else type(error).__name__}"


def mark(value: Any, control_tokens: re.Pattern[str]) -> Any:
    """The messages, with marks around each control token's text in their strings (keys are left as they are).

    Raises `ChatError` where a string holds a mark itself.
    """
    if isinstance(value, str):
        if MARK_START in value or MARK_END in value:
            raise ChatError("a message holds U+FDD0 or U+FDD1, noncharacters that are kept for internal use")
        return control_tokens.sub(rf"{MARK_START}\g<0>{MARK_END}", value)
    if isinstance(value, Mapping):
        return {key: mark(item, control_tokens) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mark(item, control_tokens) for item in value]
    return value
