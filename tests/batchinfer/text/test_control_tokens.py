"""Which control tokens a chat's messages can spell out, and where a text is cut."""

import pytest

from batchinfer.text.control_tokens import ControlTokens
from batchinfer.text.tracked import Tracked, follow

TOKENS = ["<|im_end|>", "</think>", "<think>", "[INST]", "[A]", "[A][B]"]


@pytest.mark.parametrize(
    ("tokens", "text", "expected"),
    [
        (TOKENS, "nothing of it: (a, b) {c} 1|2 d_e/f", False),
        (TOKENS, "1 < 2", False),
        (TOKENS, "2 > 1 and 1 < 2", True),
        (["<|im_end|>"], "2 > 1 and 1 < 2", False),
        (["<|im_end|>"], "_ > | <", True),
        (TOKENS, "a[0]", True),
        (["<|im_end|>"], "a[0]", False),
        (["<\uff5cUser\uff5c>"], "<|User|>", False),
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


def test_only_what_comes_wholly_from_messages_is_cut_out() -> None:
    parts = [Tracked("a<|im_end|>"), "<|im_end|><", Tracked("think"), ">", Tracked("<|im_"), Tracked("end|>[A]"), "[B]"]
    assert ControlTokens(TOKENS).cut(follow("").join(parts)) == [
        ("a", True),
        ("<|im_end|>", False),
        ("<|im_end|><think>", True),
        ("<|im_end|>", False),
        ("[A][B]", True),
    ]
    assert ControlTokens(TOKENS).cut(Tracked("[A][B]")) == [("[A][B]", False)]
    assert ControlTokens(TOKENS).cut(Tracked("")) == []
