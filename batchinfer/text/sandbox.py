"""The Jinja environment that chat templates run in: no access to Python's own objects, and no huge integers.

Memory and time are limited elsewhere (`limits.py`). But multiplying large integers takes little memory and cannot be
interrupted by a signal, so the size of integers is limited here.
"""

import json
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_int, do_round
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_BITS = 1 << 12  # of an integer that a product or power may give
MAX_DIGITS = 300  # of a text that is converted to an integer, and of a rounding

# These can make characters that neither their arguments nor the template hold, as "%c" makes a bracket of a number.
CHARACTER_FILTERS = frozenset({
    "e", "escape", "filesizeformat", "forceescape", "format", "pprint", "striptags", "urlencode", "urlize", "wordwrap",
    "xmlattr",
})  # fmt: skip
CHARACTER_METHODS = frozenset({"decode", "format", "format_map", "translate"})


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, with limits. It raises if a template tries to leave it."""

    intercepted_binops = frozenset({"*", "**", "%"})
    makes_characters = False  # becomes true when a template uses one of `CHARACTER_FILTERS` and the like

    def __init__(self, moment: datetime) -> None:
        """Set up Jinja for templates that take `moment` for now."""
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = moment.strftime
        self.filters["tojson"] = _tojson
        self.filters["int"] = _int
        self.filters["round"] = _round
        for name in CHARACTER_FILTERS:
            self.filters[name] = self._noted(self.filters[name])

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or a method for a template."""
        if getattr(function, "__name__", None) in CHARACTER_METHODS:
            self.makes_characters = True
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left * right`, `left ** right` or `left % right`.

        Raises `OverflowError` if the integer would be too large.
        """
        if operator == "%":
            self.makes_characters |= isinstance(left, str)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            if (bits + right.bit_length() if operator == "*" else bits * max(right, 0)) > MAX_BITS:
                raise OverflowError(f"an integer of more than {MAX_BITS} bits")
        return super().call_binop(context, operator, left, right)

    def _noted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.makes_characters = True
            return function(*args, **kwargs)

        return call


class _Generation(Extension):
    """The tag `{% generation %}`, which marks the assistant's text for training. Here only its body is rendered.

    What the body sets is not seen after it.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body).set_lineno(line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    if isinstance(value, str) and len(value) > MAX_DIGITS:
        raise OverflowError(f"an integer of more than {MAX_DIGITS} digits")
    return do_int(value, default, base)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > MAX_DIGITS:
        raise OverflowError(f"rounding to more than {MAX_DIGITS} digits")
    return do_round(value, precision, method)
