"""Marks: the texts that structure answers, as <think> and </think>. In one vocabulary they are tokens, in another text.

A mark that is a token is found by its id, so that the same characters out of ordinary tokens are none. It may be a
control token, which printed answers do not show.
"""

from collections.abc import Collection
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from batchinfer.text.control_tokens import one_of
from batchinfer.text.pieces import Piece, plain
from batchinfer.text.tokenizer import Offsets, TokenIds, Tokenizer


class Marks:
    """Cuts answers at these marks."""

    def __init__(self, tokenizer: Tokenizer, marks: Collection[str]) -> None:
        tokens = tokenizer.added_tokens
        self._tokenizer = tokenizer
        self._by_id = {tokens[mark]: mark for mark in marks if mark in tokens}
        self._ids = np.array(sorted(self._by_id), np.int32)
        spelled = [mark for mark in marks if mark not in tokens]
        self._spelled = one_of(spelled) if spelled else None

    def cut(self, token_ids: TokenIds, offsets: Offsets, hidden: NDArray[np.bool_]) -> list[list[Piece]]:
        """Return the pieces of n answers; the first piece of each has no mark.

        Answer i is `token_ids[offsets[i]:offsets[i + 1]]`. Tokens that are `hidden` [tokens] are shown nowhere, but cut
        if they are marks.
        """
        is_mark = np.isin(token_ids, self._ids)
        kept = is_mark | ~hidden
        token_ids, is_mark, offsets = token_ids[kept], is_mark[kept], np.append(0, np.cumsum(kept))[offsets]
        hidden = hidden[kept]
        places = np.flatnonzero(is_mark)
        bounds = np.sort(np.concatenate([offsets[:-1], places, offsets[-1:]]))
        # Decode a segment with its mark before it: some decoders take the space from a text's start.
        texts = iter(self._tokenizer.decode_batch(token_ids, bounds, self._ids))
        answers = []
        for start, stop in pairwise(offsets.tolist()):
            within = places[slice(*np.searchsorted(places, [start, stop]))]
            pieces = self._spelled_in(plain(next(texts)))
            for token_id, unseen in zip(token_ids[within].tolist(), hidden[within].tolist(), strict=True):
                mark, text = self._by_id[token_id], next(texts)
                text = text.removeprefix(mark)
                is_shown = not unseen and self._tokenizer.prints(token_id)
                pieces += self._spelled_in(Piece(mark, text, mark + text if is_shown else text))
            answers.append(pieces)
        return answers

    def _spelled_in(self, piece: Piece) -> list[Piece]:
        """Cut a piece at the marks that are no tokens."""
        places = [match.span() for match in self._spelled.finditer(piece.text)] if self._spelled else []
        if not places:
            return [piece]
        first = piece.text[: places[0][0]]
        found = [Piece(piece.mark, first, piece.shown[: len(piece.shown) - len(piece.text) + len(first)])]
        ends = [start for start, _ in places[1:]] + [len(piece.text)]
        for (start, stop), end in zip(places, ends, strict=True):
            found.append(Piece(piece.text[start:stop], piece.text[stop:end], piece.text[start:end]))
        return found
