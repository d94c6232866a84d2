"""Tracked text against plain text; each character's origin can be read off it, since two alphabets never mix."""

import inspect
import sys
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.text.tracked import MESSAGE, TEMPLATE, Tracked, follow, origin_of, track

# Upper and lower case of one alphabet, one character or several ("ß", "ŉ", "ﬁ"), stay in it. Both have whitespace.
OF_MESSAGE = "aAß\u017fsS\u0149\u02bcnN\ufb01fFiI,+\t\u2003"
OF_TEMPLATE = "bB\u03a3\u03c3\u03c2\u01f0jJ\u030clL\u01c5\u01c6|-\n\u2028"

pieces = st.text(OF_MESSAGE, max_size=6).map(Tracked) | st.text(OF_TEMPLATE, max_size=6)
texts = st.lists(pieces, max_size=6).map(lambda parts: follow("").join(parts))
small = st.integers(-3, 9)
seps = (
    st.none() | st.text(OF_MESSAGE, min_size=1, max_size=2).map(Tracked) | st.text(OF_TEMPLATE, min_size=1, max_size=2)
)
new = st.text(OF_MESSAGE, max_size=2).map(Tracked) | st.text(OF_TEMPLATE, max_size=2)
fill = st.sampled_from(OF_MESSAGE).map(Tracked) | st.sampled_from(OF_TEMPLATE)
slices = st.slices(12)
CASES: dict[str, tuple[Any, ...]] = {
    "__add__": (new,),
    "__radd__": (new,),
    "__mul__": (small,),
    "__rmul__": (small,),
    "__getitem__": (slices,),
    "__iter__": (),
    "__str__": (),
    "capitalize": (),
    "casefold": (),
    "center": (small, fill),
    "join": (st.lists(new, max_size=4),),
    "ljust": (small, fill),
    "lower": (),
    "lstrip": (seps,),
    "partition": (seps.filter(bool),),
    "removeprefix": (new,),
    "removesuffix": (new,),
    "replace": (new, new, small),
    "rjust": (small, fill),
    "rpartition": (seps.filter(bool),),
    "rsplit": (seps, small),
    "rstrip": (seps,),
    "split": (seps, small),
    "splitlines": (st.booleans(),),
    "strip": (seps,),
    "swapcase": (),
    "title": (),
    "upper": (),
}
ALL_OR_NOTHING: dict[str, tuple[Any, ...]] = {
    "expandtabs": (small,),
    "translate": (st.dictionaries(st.sampled_from([ord(c) for c in OF_MESSAGE]), new),),
}
NOT_TEXT = ["count", "encode", "endswith", "find", "index", "rfind", "rindex", "startswith", "maketrans"]
BY_THE_SANDBOX = ["format", "format_map"]


def plain(value: Any) -> Any:
    if isinstance(value, str):
        return str.__str__(value)
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def all_of(result: Any) -> list[Any]:
    return [result] if isinstance(result, str) else list(result)


def outcome(name: str, text: str, args: list[Any]) -> tuple[list[Any], str]:
    try:
        if name == "__radd__":
            return [args[0] + text], ""
        return all_of(getattr(text, name)(*args)), ""
    except (ValueError, TypeError) as error:
        return [], type(error).__name__


@pytest.mark.parametrize("name", [*CASES, *ALL_OR_NOTHING])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_each_operation_gives_the_same_text_and_keeps_origins(name: str, data: st.DataObject) -> None:
    text = data.draw(texts)
    args = [data.draw(strategy) for strategy in (CASES | ALL_OR_NOTHING)[name]]
    results, error = outcome(name, text, args)
    expected = outcome(name, plain(text), [plain(arg) for arg in args])
    assert (results, error) == expected
    for result in results:
        assert isinstance(result, Tracked) and len(origin_of(result)) == len(result)
        from_messages = [MESSAGE[0] if c in OF_MESSAGE else TEMPLATE[0] for c in result]
        if name in CASES and (name not in ("title", "capitalize") or len(result) == len(text)):
            assert list(origin_of(result)) == from_messages
        assert all(a >= b for a, b in zip(origin_of(result), from_messages, strict=True))


@settings(max_examples=40, deadline=None)
@given(texts, st.integers(-12, 12))
def test_an_index_gives_one_character_with_its_origin(text: Tracked, index: int) -> None:
    try:
        expected = plain(text)[index]
    except IndexError:
        with pytest.raises(IndexError):
            text[index]
        return
    assert text[index] == expected and origin_of(text[index])[0] == origin_of(text)[index]


@given(st.text("0+-7", max_size=4), small)
def test_zeros_are_the_templates(text: str, width: int) -> None:
    filled = Tracked(text).zfill(width)
    assert filled == text.zfill(width)
    assert origin_of(filled).count(MESSAGE) == len(text)


def test_every_method_of_a_string_is_followed_or_gives_no_text() -> None:
    names = {name for name in dir(str) if not name.startswith("_") and not name.startswith("is")}
    followed = {*CASES, *ALL_OR_NOTHING, "zfill"}
    assert names <= followed | {*NOT_TEXT, *BY_THE_SANDBOX}
    assert all(name in vars(Tracked) for name in followed)


def test_a_tracked_text_is_its_plain_text_to_everybody_else() -> None:
    text = Tracked("role")
    assert text == "role" and hash(text) == hash("role") and {"role": 1}[text] == 1 and {text: 1}["role"] == 1
    assert text in ("role",) and "ol" in text and text < "rule" and type(str(text)) is Tracked
    assert list(inspect.signature(lambda **names: names).bind(**{text: 1}).arguments["names"]) == ["role"]


def test_keywords_keep_their_origin() -> None:
    def keywords(**given: int) -> list[str]:
        return list(given)

    assert [type(name) for name in keywords(**{Tracked("a"): 1})] == [Tracked]


def test_all_strings_of_messages_are_tracked() -> None:
    messages = [{"role": "user", "content": [{"text": "a", "n": (1, "b", None, True)}], "tool": {"x": {"y": "z"}}}]
    tracked = track(messages)
    assert tracked == messages

    def kinds(value: Any) -> set[type]:
        if isinstance(value, dict):
            return kinds(list(value)) | kinds(list(value.values()))
        return set().union(*map(kinds, value)) if isinstance(value, list | tuple) else {type(value)}

    assert kinds(tracked) == {Tracked, int, type(None), bool}


def test_no_change_of_case_makes_punctuation_or_shortens_a_text() -> None:
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        for other in {character.upper(), character.lower(), character.title(), character.casefold()} - {character}:
            assert other and not any(unicodedata.category(c)[0] in "PS" and c.lower() == c.upper() for c in other)
