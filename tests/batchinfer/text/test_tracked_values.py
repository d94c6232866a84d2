"""Values written as text against Python and `json`: the texts in them keep their origin, all else is message text."""

import json
from string import Formatter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.text.tracked import MESSAGE, TEMPLATE, Tracked, follow, origin_of
from batchinfer.text.tracked_values import formatted, join, json_of, percent, text_of

OF_MESSAGE, OF_TEMPLATE = "mé<\n\U0001f98a'\"\\", "tßŒ>\r\U0001f42b"  # quotes and backslashes are of messages
mixed = st.lists(st.text(OF_MESSAGE).map(Tracked) | st.text(OF_TEMPLATE), max_size=3).map(join)
texts = st.text(OF_MESSAGE, max_size=4).map(Tracked) | st.text(OF_TEMPLATE, max_size=4) | mixed
scalars = st.none() | st.booleans() | st.integers(-99, 99) | st.just(0.5) | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
quick = settings(max_examples=60, deadline=None)


def plain(value: Any) -> Any:
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


def check(written: str) -> None:
    """Check that no message text is taken for the template's."""
    for character, origin in zip(written, origin_of(written), strict=True):
        if character in "mé<\U0001f98a":  # others may be part of an escape
            assert origin == MESSAGE[0]


@quick
@given(values)
def test_str_is_that_of_python(value: Any) -> None:
    written = text_of(value)
    assert written == str(plain(value))
    check(written)


@quick
@given(values, st.booleans(), st.booleans(), st.none() | st.integers(0, 2), st.none() | st.just((",", " : ")))
def test_json_is_that_of_json(value: Any, ascii: bool, sort: bool, indent: int | None, separators: Any) -> None:
    expected = json.dumps(plain(value), ensure_ascii=ascii, indent=indent, separators=separators, sort_keys=sort)
    written = json.dumps(value, ensure_ascii=ascii, indent=indent, separators=separators, sort_keys=sort)
    followed = json_of(value, written, ascii, sort)
    assert followed == expected
    check(followed)


def test_texts_keep_their_origin_in_what_is_written() -> None:
    value = {"t": [Tracked("m\n"), "tt", 1], Tracked("é"): "t" + Tracked("é") + "t"}
    for written in (text_of(value), json_of(value, json.dumps(value), True, False)):
        assert {c for c, o in zip(written, origin_of(written), strict=True) if o == TEMPLATE[0]} == {"t"}
        assert [o for c, o in zip(written, origin_of(written), strict=True) if c == "t"] == [TEMPLATE[0]] * 5
    assert written.count("\\u00e9") == 2


def test_what_cannot_be_followed_is_message_text() -> None:
    class Odd:
        def __repr__(self) -> str:
            return "'t'"

    for value in (Odd(), [Odd(), "t"], {1: "t"}.values(), b"t", 1, None):
        assert set(origin_of(text_of(value))) == {MESSAGE[0]}


FORMS = [
    ("%s|%s", ("t", Tracked("m"))),
    ("%s", "t"),
    ("%s", ["t"]),
    ("%%%s%%", Tracked("m")),
    ("%(a)s %(b)s", {"a": "t", "b": Tracked("m")}),
    ("%(a)5s %(b)r", {"a": "t", "b": Tracked("m")}),
    ("%c%d %x %.2f %-4s|", (60, 3, 255, 1.5, "t")),
    ("%*d", (4, 3)),
    ("%%", ()),
    (Tracked("%s <"), "t"),
    (Tracked("<") + "%s" + Tracked("%%"), Tracked("m")),
]


@pytest.mark.parametrize(("form", "given"), FORMS)
def test_percent_is_that_of_python(form: str, given: Any) -> None:
    written = percent(form, given)
    assert written == str.__str__(form) % plain(given)
    check(written)


@pytest.mark.parametrize(
    ("form", "args", "kwargs"),
    [
        ("{}{}", ("t", Tracked("m")), {}),
        ("{1}t{0}", ("t", Tracked("m")), {}),
        ("{a}{{}}{b}", (), {"a": Tracked("m"), "b": "t"}),
        ("{:>5}{!r}{:c}", ("t", Tracked("m"), 60), {}),
        ("{:{}}|{}", ("t", 6, Tracked("m")), {}),
        ("{0[0]}{a[b]}", ([Tracked("m")],), {"a": {"b": "t"}}),
        (Tracked("{}<"), ("t",), {}),
    ],
)
def test_format_is_that_of_python(form: str, args: Any, kwargs: Any) -> None:
    written = formatted(Formatter(), form, args, kwargs)
    assert written == str.__str__(form).format(*plain(args), **plain(kwargs))
    check(written)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (percent("t%s%st", (Tracked("m"), "t")), b"\0\1\0\0"),
        (percent("t%%%(a)s", {"a": Tracked("m")}), b"\0\0\1"),
        (formatted(Formatter(), "t{}{a}t", ("t",), {"a": Tracked("m")}), b"\0\0\1\0"),
        (percent("t%5s", ("t",)), b"\0\1\1\1\1\1"),
        (percent("%*s", (2, "t")), b"\1\1"),
        (follow("").join(["t", Tracked("m")]), b"\0\1"),
    ],
)
def test_where_texts_land(written: str, expected: bytes) -> None:
    assert origin_of(written) == expected


def test_errors_are_those_of_python() -> None:
    for form, values in (("%s%s", ("a",)), ("%s", ()), ("%(a)s", "b"), ("%d", "b"), ("%y", 1), ("%(b)s", {"a": 1})):
        with pytest.raises((TypeError, ValueError, KeyError)) as expected:
            form % values
        with pytest.raises(expected.type):
            percent(form, values)
