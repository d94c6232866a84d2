"""Chat templates: messages in, the text of a prompt out, by the checkpoint's own Jinja template in a sandbox."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]  # at least "role" and "content"

# Two Unicode noncharacters, which text for interchange never holds, enclose a control token's text in a message.
MARK_START, MARK_END = "\ufdd0", "\ufdd1"
MAX_RENDERED = 5 << 20  # characters


class ChatError(Exception):
    """These messages do not go through this template; the text holds nothing of the messages."""


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled chat template and the names of special tokens that it may use."""

    source: str
    template: jinja2.Template
    variables: Mapping[str, str]  # bos_token, eos_token, ...

    @staticmethod
    def compile(source: str, variables: Mapping[str, str]) -> "ChatTemplate":
        """Raises `ValueError` with the line where the template's syntax is wrong."""
        try:
            template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template has a syntax error on line {error.lineno}: {error.message}") from error
        return ChatTemplate(source, template, variables)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt's text, up to where the assistant's turn begins. Keys that are None are left out.

        Raises `ChatError` if the template raises, whatever it raises, or writes more than `MAX_RENDERED` characters.
        """
        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        pieces, size = [], 0
        try:
            for piece in self.template.generate(
                **self.variables, messages=present, tools=None, documents=None, add_generation_prompt=True
            ):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_RENDERED:
                    raise ChatError(f"the chat template wrote more than {MAX_RENDERED} characters")
        except ChatError:
            raise
        except Exception as error:  # a template is a program: it may fail in any way
            raise ChatError(self._reason(error)) from error
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


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; here its body is all that counts."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    now = datetime.now()  # one moment for the whole job

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    environment.filters["tojson"] = tojson
    return environment
