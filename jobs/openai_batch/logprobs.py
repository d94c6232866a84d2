"""The log-probabilities of tokens as responses have them: in one form in a chat, in another in a completion."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

VERY_UNLIKELY = -9999.0  # what the API gives for a token that the model rules out
REPLACED = "\ufffd"

Entry = Mapping[str, Any]  # of a result column: a token and the likeliest ones in its place


def of_chat(entries: Sequence[Entry] | None) -> dict[str, Any] | None:
    """Return them as a choice of a chat has them."""
    if entries is None:
        return None
    content = [_token(entry) | {"top_logprobs": [_token(other) for other in entry["top"]]} for entry in entries]
    return {"content": content, "refusal": None}


def of_completion(entries: Sequence[Entry] | None) -> dict[str, Any] | None:
    """Return them as a choice of a completion has them; of tokens with the same text, the likelier one is there."""
    if entries is None:
        return None
    tokens = [entry["token"] for entry in entries]
    return {
        "tokens": tokens,
        "token_logprobs": [_logprob(entry) for entry in entries],
        "top_logprobs": [_by_text([*entry["top"], entry]) for entry in entries],
        "text_offset": [*accumulate(map(len, tokens), initial=0)][:-1],
    }


def _by_text(entries: Sequence[Entry]) -> dict[str, float]:
    found: dict[str, float] = {}
    for entry in entries:
        found.setdefault(entry["token"], _logprob(entry))
    return found


def _token(entry: Entry) -> dict[str, Any]:
    """Return a token; a text that is a part of a character has no bytes, since its own are not known."""
    text = entry["token"]
    return {
        "token": text,
        "logprob": _logprob(entry),
        "bytes": None if REPLACED in text else [*text.encode()],
    }


def _logprob(entry: Entry) -> float:
    return VERY_UNLIKELY if entry["logprob"] is None else float(entry["logprob"])
