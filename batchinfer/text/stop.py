"""Finding where an answer ends, and what of it is printed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchinfer.text.tokenizer import Offsets, TokenIds, Tokenizer


class Stop(NamedTuple):
    """What ends an answer and is left out of its text."""

    texts: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()


def before_stop(text: str, stop: tuple[str, ...]) -> str:
    """The text before the first stop string in it."""
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]


def printed_answers(tokenizer: Tokenizer, token_ids: TokenIds, offsets: Offsets, stops: Sequence[Stop]) -> list[str]:
    """Return the text of n answers, each up to the first of its stop strings and without its stop tokens [n].

    Answer i is `token_ids[offsets[i]:offsets[i + 1]]`.
    """
    kept = ~stopping(token_ids, offsets, stops)
    texts = tokenizer.decode_batch(token_ids[kept], np.append(0, np.cumsum(kept))[offsets])
    return [before_stop(text, stop.texts) if stop.texts else text for text, stop in zip(texts, stops, strict=True)]


def stopping(token_ids: TokenIds, offsets: Offsets, stops: Sequence[Stop]) -> NDArray[np.bool_]:
    """Return which tokens of n answers are stop tokens of their answer [tokens]."""
    found = np.zeros(len(token_ids), np.bool_)
    if not any(stop.token_ids for stop in stops):
        return found
    different = {ids: i for i, ids in enumerate(dict.fromkeys(stop.token_ids for stop in stops))}
    of_token = np.repeat([different[stop.token_ids] for stop in stops], np.diff(offsets))
    for ids, i in different.items():
        found |= (of_token == i) & np.isin(token_ids, ids)
    return found
