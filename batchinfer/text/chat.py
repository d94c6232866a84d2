"""Chat templates: turning messages into a prompt's text with the checkpoint's own Jinja template, in a sandbox."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from types import MappingProxyType
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Name

from batchinfer.host.limits import limited
from batchinfer.text.chat_arguments import Arguments
from batchinfer.text.sandbox import Sandbox
from batchinfer.text.tracked import Tracked, track
from batchinfer.text.tracking_sandbox import TrackingSandbox

Message = Mapping[str, Any]  # at least "role", and "content" or "tool_calls"
Tool = Mapping[str, Any]  # a function that the model may call, as a JSON schema

NO_ARGUMENTS: Arguments = MappingProxyType({})
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys for the reasoning before an answer, by precedence

MAX_RENDERED = 5 << 20  # characters
MAX_SOURCE = 1 << 18  # characters
MAX_SECONDS = 10.0  # of processor time, for one conversation
MAX_MEMORY = 1 << 30  # bytes, for one conversation

_UNDEFINED = re.compile(r"'(\w+)' is undefined")  # jinja2's message


class ChatError(Exception):
    """The template cannot render these messages. The error's text quotes nothing from them."""

    code = "template_error"  # of the row


class ArgumentMissing(ChatError):
    """The template needs an argument that was not given."""

    code = "missing_argument"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the chat template needs the argument {name!r}; give it with --chat-template-kwargs '{{\"{name}\": ...}}'"
        )


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
    reads: frozenset[str]  # names of variables that it does not set before it reads them

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
                reads = frozenset(find_undeclared_variables(tree))
                template = sandbox.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template has a syntax error on line {error.lineno}: {error.message}") from error
        except Exception as error:  # for example nesting that is too deep, or a constant that cannot be computed
            raise ValueError(f"the chat template cannot be compiled ({type(error).__name__})") from error
        return ChatTemplate(source, template, variables, moment, "strftime_now" in names, "tools" in names, reads)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, arguments: Arguments = NO_ARGUMENTS
    ) -> str:
        """Return the prompt's text, up to where the assistant's turn begins.

        A message's keys whose value is None are left out. Its reasoning is there under both names that templates read.
        `arguments` are further variables; they win over special tokens of the same name.

        Raises `ChatError` if the template raises anything or writes more than `MAX_RENDERED` characters, as
        `ArgumentMissing` if it is for want of an argument. Raises `TemplateRefused` if it takes more than `MAX_SECONDS`
        (checked in the main thread only) or `MAX_MEMORY`, or tries to leave the sandbox.
        """
        self._sandbox.makes_characters = False
        with self._limits():
            return self._write(self.template, _present(messages), tools, arguments)

    def follow(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, arguments: Arguments, text: str
    ) -> Tracked:
        """Return `text`, which `render` gave for the same, with the origin of each character: texts in messages, tools
        and arguments count as a message's.

        Raises what `render` raises, and `ChatError` if the text comes out as another one, since then the origins are
        unknown.
        """
        with self._limits():
            followed = self._write(self._tracking, track(_present(messages)), track(tools), track(arguments))
        if followed != text:
            raise ChatError(
                "a message holds a control token's text, which cannot be followed through the chat template; take it "
                "out, or read it as a control token with --allow-special-tokens"
            )
        return followed if isinstance(followed, Tracked) else Tracked(followed)

    @property
    def makes_characters(self) -> bool:
        """True if what was rendered may hold characters from messages that the messages do not hold."""
        return self._sandbox.makes_characters

    @property
    def _sandbox(self) -> Sandbox:
        assert isinstance(self.template.environment, Sandbox)
        return self.template.environment

    @cached_property
    def _tracking(self) -> jinja2.Template:
        return TrackingSandbox(self.moment).from_string(self.source)

    @contextmanager
    def _limits(self) -> Iterator[None]:
        try:
            with limited(MAX_SECONDS, MAX_MEMORY):
                yield
        except ChatError:
            raise
        except TimeoutError as error:
            raise TemplateRefused(f"the chat template {error}") from error
        except MemoryError as error:
            raise TemplateRefused(f"the chat template took more than {MAX_MEMORY >> 20} MiB") from error
        except jinja2.UndefinedError as error:
            missing = _UNDEFINED.fullmatch(str(error))
            if missing is None or missing[1] not in self.reads:
                raise ChatError(self._reason(error)) from error
            raise ArgumentMissing(missing[1]) from error
        except SecurityError as error:
            raise TemplateRefused("the chat template did what its sandbox forbids") from error
        except Exception as error:  # a template is a program: it may fail in any way
            raise ChatError(self._reason(error)) from error

    def _write(
        self, template: jinja2.Template, messages: list[Message], tools: Sequence[Tool] | None, arguments: Arguments
    ) -> str:
        written, size = [], 0
        own = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": True}
        for text in template.generate({**self.variables, **arguments, **own}):
            written.append(text)
            size += len(text)
            if size > MAX_RENDERED:
                raise ChatError(f"the chat template wrote more than {MAX_RENDERED} characters")
        return template.environment.concat(written)

    def _reason(self, error: Exception) -> str:
        # An error text that occurs in the template's source quotes nothing from the prompt; any other text might.
        known = isinstance(error, jinja2.TemplateError) and str(error) and str(error) in self.source
        return f"the chat template raised {error if known else type(error).__name__}"


def _present(messages: Sequence[Message]) -> list[Message]:
    return [_present_in(message) for message in messages]


def _present_in(message: Message) -> Message:
    present = {key: value for key, value in message.items() if value is not None}
    found = [present[key] for key in REASONING if key in present]
    return {"thinking": found[0], **present, "reasoning_content": found[0]} if found else present
