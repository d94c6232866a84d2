"""The texts of a tokenizer's control tokens, and which of them a chat's messages can spell out."""

import re
import unicodedata
from collections.abc import Collection
from itertools import takewhile

from batchinfer.text.tracked import Tracked, message_part

# Characters that JSON and Python write around values. A bracket that they open is followed by one of the values below.
_NOTATION = frozenset("\"'\\(){},:.+-]")
_LIST = re.compile(r"""\[(?!\Z|true|false|null|none|nan|inf|[\[\](){}"'\d\s-])""", re.IGNORECASE)
_OF_WORDS = frozenset("_-/")  # a role or a name may have these, as letters


class ControlTokens:
    """The texts of control tokens.

    A control token is the template's where all that messages add to it are words, as in `'<|' + role + '|>'`; not where
    they add one of its signs, nor where they spell all of it.
    """

    def __init__(self, texts: Collection[str]) -> None:
        self._pattern = one_of(texts)
        needs = [_signs(text) - _NOTATION - (set() if _LIST.search(text) else {"["}) for text in texts]
        self._signs = frozenset().union(*needs)
        self._made_of_words = not all(needs)

    def may_come_from(self, text: str) -> bool:
        """Tell whether characters of `text` could make a control token that is not the template's.

        Changes of case make no punctuation, and cuts make no character at all. What else could is noted where it runs
        (`Sandbox.makes_characters`).
        """
        return self._made_of_words or any(sign in text for sign in self._signs)

    def cut(self, text: Tracked) -> list[tuple[str, bool]]:
        """Cut a text into segments (text, whether its control tokens are such).

        The text of a control token that is not the template's is a segment in which none is.
        """
        segments, end = [], 0
        for match in self._pattern.finditer(text):
            part = message_part(text, *match.span())
            if part == match[0] or _signs(part):
                segments += [(text[end : match.start()], True), (match[0], False)]
                end = match.end()
        return [segment for segment in [*segments, (text[end:], True)] if segment[0]]


def one_of(texts: Collection[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the texts, as a tokenizer does: of those at one place, the longest."""
    return re.compile(_tree(set(texts)) if texts else "(?!)")  # "(?!)" never matches


def _tree(texts: set[str]) -> str:
    """Return the source of a pattern that reads each character once, however many texts there are."""
    first, last = min(texts), max(texts)
    start = first[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))]
    rests = {text[len(start) :] for text in texts}
    longer = {rest for rest in rests if rest}
    if not longer:
        return re.escape(start)
    branches = (_tree({rest for rest in longer if rest[0] == first}) for first in sorted({rest[0] for rest in longer}))
    return f"{re.escape(start)}(?:{'|'.join(branches)}){'' if longer == rests else '?'}"


def _signs(text: str) -> frozenset[str]:
    """Return the punctuation and symbols of a text that no change of case makes."""
    signs = {sign for sign in text if unicodedata.category(sign)[0] in "PS" and sign.lower() == sign.upper()}
    return frozenset(signs - _OF_WORDS)
