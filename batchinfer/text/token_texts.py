"""`TokenTexts`: the text of a single token, as it stands in a longer text.

A tokenizer may take off the space before a text's first word. So a token is decoded behind another one.
"""

from batchinfer.text.tokenizer import TokenIds, Tokenizer


class TokenTexts:
    """Remembers the text of each token that it was asked for. Bytes that make no whole character are U+FFFD."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._before = tuple(tokenizer.encode_plain(["\n"])[0])
        self._start = tokenizer.text_of(self._before)

    def of(self, token_ids: TokenIds) -> list[str]:
        """Return the texts of these tokens."""
        ids: list[int] = token_ids.tolist()
        for token in set(ids).difference(self._known):
            text = self._tokenizer.text_of((*self._before, token))
            behind = text.startswith(self._start)
            self._known[token] = text[len(self._start) :] if behind else self._tokenizer.text_of((token,))
        return [self._known[token] for token in ids]
