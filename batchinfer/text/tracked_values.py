"""Writing values as text that knows its origin: `str`, `tojson`, `%` and `format` of values that hold tracked text.

Brackets, quotes, numbers and the like count as message text: messages may hold the lists and numbers that they write.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from string import Formatter
from typing import Any

from batchinfer.text.tracked import Tracked, follow, leaves, origin_of, origin_when, unfollowed

_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_PYTHON_STRING = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
_CONVERSION = re.compile(r"%(?:\((.*?)\))?[#0 +-]*(?:\*|\d*)(?:\.(?:\*|\d*))?[hlL]?(.)", re.DOTALL)


def text_of(value: Any) -> str:
    """Return `str(value)`."""
    if type(value) is str or isinstance(value, Tracked):
        return value
    return _with_origins(str(value), leaves(value), repr, _PYTHON_STRING)


def json_of(value: Any, written: str, ensure_ascii: bool, sort_keys: bool) -> Tracked:
    """Return `written`, the JSON of the value."""

    def quote(text: str) -> str:
        return json.dumps(text, ensure_ascii=ensure_ascii)

    return _with_origins(written, leaves(value, sort_keys), quote, _JSON_STRING)


def join(parts: Iterable[Any], between: str = "") -> Tracked:
    """Return the texts of the parts, with `between` between two."""
    return follow(between).join(map(text_of, parts))


def percent(form: str, values: Any) -> Tracked:
    """Return `form % values`."""
    whole = str.__mod__(form, values)
    given = iter(values if isinstance(values, tuple) else (values,))
    parts: list[str] = []
    end = 0
    with suppress(LookupError, TypeError, ValueError, StopIteration):  # then it cannot be followed
        for match in _CONVERSION.finditer(form):
            parts.append(form[end : match.start()])
            end = match.end()
            name, kind = match.groups()
            if kind == "%":
                parts.append(form[end - 1 : end])
                continue
            value = next(given) if name is None else values[name]
            plain = match[0] == ("%s" if name is None else f"%({name})s")
            parts.append(text_of(value) if plain else Tracked(match[0] % ((value,) if name is None else values)))
        return _checked(join([*parts, form[end:]]), whole)
    return Tracked(whole)


def formatted(formatter: Formatter, form: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tracked:
    """Return `form.format(*args, **kwargs)`."""
    whole = formatter.vformat(form, args, kwargs)
    literal = follow(form)
    numbers = count()
    parts: list[str] = []
    with suppress(LookupError, TypeError, ValueError):  # then it cannot be followed
        for text, field, spec, conversion in formatter.parse(form):
            parts.append(unfollowed(literal, text))
            if field is None:
                continue
            value, _ = formatter.get_field(field or str(next(numbers)), args, kwargs)
            if spec or conversion:
                value = Tracked(formatter.format_field(formatter.convert_field(value, conversion), spec or ""))
            parts.append(text_of(value))
        return _checked(join(parts), whole)
    return Tracked(whole)


def _checked(followed: Tracked, whole: str) -> Tracked:
    return followed if followed == whole else Tracked(whole)


def _with_origins(
    written: str, values: Iterable[Any], quote: Callable[[str], str], literal: re.Pattern[str]
) -> Tracked:
    """Return what was written for some values; the strings among them, quoted there, keep their origin."""
    strings = [value for value in values if isinstance(value, str)]
    found = list(literal.finditer(written))
    origin = bytearray(origin_of(Tracked(written)))
    if [match[0] for match in found] == [quote(text) for text in strings]:
        for match, text in zip(found, strings, strict=True):
            start, stop = match.start() + 1, match.end() - 1
            origin[start:stop] = origin_when(lambda part: quote(part)[1:-1], follow(text), stop - start)
    return Tracked(written, bytes(origin))
