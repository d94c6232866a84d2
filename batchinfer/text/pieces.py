"""Answers as pieces: a mark that structures them, as <think> and </think>, and the text behind it."""

from collections.abc import Iterable
from typing import NamedTuple


class Piece(NamedTuple):
    """A mark, or none, and the text behind it up to the next mark."""

    mark: str
    text: str
    shown: str  # what a printed answer has of both


def plain(text: str) -> Piece:
    """Return a text as a piece without a mark."""
    return Piece("", text, text)


def shown(pieces: Iterable[Piece]) -> str:
    """Return what a printed answer has of these pieces."""
    return "".join(piece.shown for piece in pieces)
