"""Control tokens that a chat's messages can spell out are found, and the text is cut there."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.text.control_tokens import ControlTokens, one_of
from batchinfer.text.tracked import Tracked, follow

TOKENS = ["<|im_end|>", "</think>", "<think>", "[INST]", "[A]", "[A][B]"]


@pytest.mark.parametrize(
    ("tokens", "text", "expected"),
    [
        (TOKENS, "nothing of it: (a, b) {c} 1-2 d_e/f", False),
        (TOKENS, "1 < 2", True),
        (TOKENS, "1|2", True),
        (["<think>"], "1|2", False),
        (TOKENS, "2 > 1 and 1 < 2", True),
        (TOKENS, "a[0]", True),
        (["<|im_end|>"], "a[0]", False),
        (["<\uff5cUser\uff5c>"], "|User|", False),
        ([], "<|im_end|>", False),
        # Numbers, lists and letters may come out of JSON, and out of a change of case.
        (["[1]", "<s>"], "", True),
        (["[true]"], "", True),
        (["[Nan]"], "", True),
        (["['a']"], "", True),
        (["["], "", True),
        (["[Ⓐ]"], "x", False),
        (["Ⓐ"], "x", True),
        (["EOS"], "x", True),
        (["\\n"], "x", True),
    ],
)
def test_what_messages_can_spell(tokens: list[str], text: str, expected: bool) -> None:
    assert ControlTokens(tokens).may_come_from(text) == expected


def test_what_messages_spell_or_give_a_sign_of_is_cut_out() -> None:
    parts = [Tracked("a<|im_end|>"), "<|im_end|><", Tracked("think"), ">", Tracked("<|im_"), Tracked("end|>[A]"), "[B]"]
    assert ControlTokens(TOKENS).cut(follow("").join(parts)) == [
        ("a", True),
        ("<|im_end|>", False),
        ("<|im_end|><think>", True),
        ("<|im_end|>", False),
        ("[A][B]", False),
    ]
    assert ControlTokens(TOKENS).cut(Tracked("[A][B]")) == [("[A][B]", False)]
    assert ControlTokens(TOKENS).cut(Tracked("")) == []


def test_words_of_messages_may_be_in_a_token_of_the_template() -> None:
    def cut(*parts: str) -> list[tuple[str, bool]]:
        return ControlTokens(["<|im_end|>", "<|user|>", "</think>", "<s>", "<s>\n"]).cut(follow("").join(parts))

    assert cut("<|", Tracked("user"), "|>") == [("<|user|>", True)]
    assert cut("<", Tracked("/think"), ">") == [("</think>", True)]
    assert cut("<", Tracked("|im_end|"), ">") == [("<|im_end|>", False)]
    assert cut("<", Tracked("|im_end|><s"), ">") == [("<|im_end|>", False), ("<s>", False)]
    assert cut(Tracked("<s>"), "\n") == [("<s>\n", False)]


@given(
    texts=st.lists(st.text("ab<>|", min_size=1, max_size=5), min_size=1, max_size=8),
    text=st.text("ab<>|", max_size=30),
)
def test_the_longest_text_at_a_place_is_found(texts: list[str], text: str) -> None:
    plain = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
    assert [match.span() for match in one_of(texts).finditer(text)] == [m.span() for m in plain.finditer(text)]


def test_no_text_is_no_match() -> None:
    assert one_of([]).search("anything") is None
