"""The texts of a tokenizer's control tokens, and which of them a chat's messages can spell out."""

import re
import unicodedata
from collections.abc import Collection

from batchinfer.text.tracked import Tracked, is_message

# Characters that JSON and Python write around values. A bracket that they open is followed by one of the values below.
_NOTATION = frozenset("\"'\\(){},:.+-]")
_LIST = re.compile(r"""\[(?!\Z|true|false|null|none|nan|inf|[\[\](){}"'\d\s-])""", re.IGNORECASE)


class ControlTokens:
    """The texts of control tokens."""

    def __init__(self, texts: Collection[str]) -> None:
        # The longest comes first, because the tokenizer matches that way; "(?!)" matches nothing.
        self._pattern = one_of(texts)
        needs = {_needs(text) for text in texts}
        self._needs = [need for need in needs if not any(other < need for other in needs)]

    def may_come_from(self, text: str) -> bool:
        """Tell whether a template could make a control token of characters from `text` alone.

        Changes of case make no punctuation, and cuts make no character at all. What else could is noted where it runs
        (`Sandbox.makes_characters`).
        """
        return any(all(character in text for character in need) for need in self._needs)

    def cut(self, text: Tracked) -> list[tuple[str, bool]]:
        """Cut a text into segments (text, whether its control tokens are such).

        The text of a control token that comes from messages alone is a segment in which none is.
        """
        segments, end = [], 0
        for match in self._pattern.finditer(text):
            if is_message(text, *match.span()):
                segments += [(text[end : match.start()], True), (match[0], False)]
                end = match.end()
        return [segment for segment in [*segments, (text[end:], True)] if segment[0]]


def one_of(texts: Collection[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the texts, as a tokenizer does: of those at one place, the longest."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")  # "(?!)" never matches


def _needs(text: str) -> frozenset[str]:
    """Return the characters of a control token that must be in messages for it to come from them alone."""
    signs = {sign for sign in text if unicodedata.category(sign)[0] in "PS" and sign.lower() == sign.upper()}
    return frozenset(signs - _NOTATION - (set() if _LIST.search(text) else {"["}))
