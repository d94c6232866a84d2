"""The sandbox in which the text of messages is followed through a chat template, to its place in the prompt.

Text that a template writes itself is exact `str`. Text from messages, and all that is mixed of both, is `Tracked`. A
result of anything that does not follow characters counts as message text.
"""

from collections.abc import Callable
from datetime import datetime
from functools import wraps
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
from jinja2.exceptions import FilterArgumentError
from jinja2.filters import do_title, make_attrgetter
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import SandboxedFormatter
from jinja2.utils import Cycler, Joiner, pass_environment

from batchinfer.text.sandbox import CHARACTER_FILTERS, Sandbox
from batchinfer.text.tracked import Tracked, follow, recased
from batchinfer.text.tracked_values import formatted, join, json_of, percent, text_of

# What these and their methods return holds the very texts that were given to them, or is tracked.
_FOLLOWING = (Tracked, Macro, BlockReference, LoopContext, Cycler, Joiner, dict, list, tuple, type)


class TrackingSandbox(Sandbox):
    """A sandbox whose templates render the same text, but tracked."""

    concat = staticmethod(join)

    def __init__(self, moment: datetime) -> None:
        """Set up a sandbox like `Sandbox(moment)`."""
        super().__init__(moment)
        for name in CHARACTER_FILTERS:
            self.filters[name] = _as_message(self.filters[name])
        for name in ("capitalize", "center", "lower", "trim", "upper"):
            self.filters[name] = _of_text(self.filters[name])
        self.filters |= {
            "format": _format,
            "indent": _indent,
            "join": _join,
            "replace": _replace,
            "safe": text_of,  # nothing is escaped
            "string": text_of,
            "title": _title,
            "tojson": _tojson_of(self.filters["tojson"]),
        }

    def from_string(self, *args: Any, **kwargs: Any) -> jinja2.Template:
        """Compile a template. In its code, what converts values to text follows characters."""
        template = super().from_string(*args, **kwargs)
        names: dict[str, Any] = template.root_render_func.__globals__
        names |= {"str": text_of, "str_join": join}
        return template

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute for a template. Methods of strings follow characters."""
        return super().getattr(follow(obj) if type(obj) is str else obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an item, or an attribute, for a template. Methods of strings follow characters."""
        return super().getitem(follow(obj) if type(obj) is str else obj, argument)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or a method for a template."""
        result = super().call(context, function, *args, **kwargs)
        owner = getattr(function, "__self__", function)
        return result if isinstance(owner, _FOLLOWING) else _message(result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operation of two values for a template."""
        if operator == "%" and isinstance(left, str):
            return percent(left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a function for `format` or `format_map` of a string, which keeps to the sandbox."""
        sandboxed = super().wrap_str_format(value)
        if sandboxed is None:
            return None
        assert isinstance(value, MethodType | BuiltinMethodType)
        form = value.__self__
        assert isinstance(form, str)
        by_map = value.__name__ == "format_map"

        @wraps(sandboxed)
        def call(*args: Any, **kwargs: Any) -> str:
            if by_map:
                return formatted(SandboxedFormatter(self), form, (), args[0])
            return formatted(SandboxedFormatter(self), form, args, kwargs)

        return call


def _message(value: Any) -> Any:
    return Tracked(value) if isinstance(value, str) and not isinstance(value, Tracked) else value


def _as_message(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _message(function(*args, **kwargs))

    return call


def _of_text(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(value: Any, *args: Any, **kwargs: Any) -> Any:
        return function(text_of(value), *args, **kwargs)

    return call


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise FilterArgumentError("the filter format takes values by position or by name, not both")
    return percent(text_of(value), kwargs or args)


def _indent(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    margin = width if isinstance(width, str) else " " * width
    lines = follow(value + "\n").splitlines()
    indented: list[str] = [margin + line if line or blank else line for line in lines]
    return follow("\n").join(indented if first else [lines[0], *indented[1:]])


@pass_environment
def _join(environment: jinja2.Environment, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return join(value, text_of(d))


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    return follow(text_of(value)).replace(text_of(old), text_of(new), -1 if count is None else count)


def _title(value: Any) -> str:
    text = follow(text_of(value))
    return recased(text, do_title(str.__str__(text)))


def _tojson_of(tojson: Callable[..., str]) -> Callable[..., str]:
    def call(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json_of(value, tojson(value, ensure_ascii, indent, separators, sort_keys), ensure_ascii, sort_keys)

    return call
