"""Messages in the harmony format of gpt-oss: an answer is several of them, each in a channel, some to a function.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>

The format is described at https://github.com/openai/harmony.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batchinfer.text.pieces import Piece, shown

_ENDS = ("<|end|>", "<|return|>", "<|call|>")
MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", *_ENDS)
_RECIPIENT = re.compile(r"\bto=(\S+)")


@dataclass(frozen=True)
class HarmonyMessage:
    """A message of an answer."""

    pieces: list[Piece]  # all of it
    channel: str  # analysis, commentary or final; empty if it has no header
    recipient: str  # the function that is called, as functions.NAME; empty if there is none
    text: str  # empty if the answer was cut in the header


def messages_of(pieces: Sequence[Piece]) -> Iterator[HarmonyMessage]:
    """Yield the messages of an answer that was cut at `MARKS`."""
    current: list[Piece] = []
    for piece in pieces:
        begins = piece.mark == "<|start|>" or (piece.mark == "<|channel|>" and _is_text(current))
        if begins and current:
            yield _message(current)
            current = []
        current.append(piece)
        if piece.mark in _ENDS:
            yield _message(current)
            current = []
    if current:
        yield _message(current)


def _is_text(pieces: Sequence[Piece]) -> bool:
    """Tell whether pieces are text outside of any message. An answer may begin with the recipient of its first one."""
    return not any(piece.mark for piece in pieces) and not _RECIPIENT.fullmatch(shown(pieces).strip())


def _message(pieces: list[Piece]) -> HarmonyMessage:
    marks = [piece.mark for piece in pieces]
    body = marks.index("<|message|>") if "<|message|>" in marks else len(pieces)
    header = {piece.mark: piece.text for piece in pieces[:body]}
    channel = header.get("<|channel|>", "").split()
    recipient = _RECIPIENT.search(" ".join(header.values()))
    text = "".join(piece.text if piece.mark in MARKS else piece.shown for piece in pieces[body:])
    if body == len(pieces) and header.keys() <= {"", *_ENDS}:  # text outside of any message
        text = shown(pieces)
    return HarmonyMessage(pieces, channel[0] if channel else "", recipient[1] if recipient else "", text)
