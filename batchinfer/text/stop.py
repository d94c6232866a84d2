"""Finding where an answer ends, and what of it is printed."""

import numpy as np

from batchinfer.text.tokenizer import Offsets, TokenIds, Tokenizer


def before_stop(text: str, stop: tuple[str, ...]) -> str:
    """The text before the first stop string in it."""
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]


def printed_answers(
    tokenizer: Tokenizer, token_ids: TokenIds, offsets: Offsets, stop: tuple[str, ...], stop_token_ids: tuple[int, ...]
) -> list[str]:
    """Return the text of n answers, up to the first stop string and without stop tokens.

    Answer i is `token_ids[offsets[i]:offsets[i + 1]]`.
    """
    if stop_token_ids:
        kept = ~np.isin(token_ids, stop_token_ids)
        token_ids, offsets = token_ids[kept], np.append(0, np.cumsum(kept))[offsets]
    texts = tokenizer.decode_batch(token_ids, offsets)
    return [before_stop(text, stop) for text in texts] if stop else texts
