"""Text that knows which of its characters come from messages, through the operations that templates have for text."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, SupportsIndex

TEMPLATE, MESSAGE = b"\0", b"\1"  # a character's origin
_RUN = re.compile(b"\0+|\1+")


class Tracked(str):
    """A text with the origin of each character. It equals the plain text and has its hash.

    Operations follow the characters. Where they cannot, all of their result counts as message text.
    """

    __slots__ = ("_origin",)
    _origin: bytes

    def __new__(cls, text: str, origin: bytes | None = None) -> "Tracked":
        """Without `origin`, one byte a character, the whole text comes from a message."""
        self = super().__new__(cls, text)
        self._origin = MESSAGE * len(self) if origin is None else origin
        return self

    def __str__(self) -> "Tracked":
        return self

    def __getitem__(self, key: SupportsIndex | slice) -> "Tracked":
        found = self._origin[key]
        return Tracked(super().__getitem__(key), found if isinstance(found, bytes) else bytes([found]))

    def __iter__(self) -> Iterator["Tracked"]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: str) -> "Tracked":
        return Tracked(super().__add__(other), self._origin + origin_of(other))

    def __radd__(self, other: str) -> "Tracked":
        return follow(other) + self

    def __mul__(self, times: SupportsIndex) -> "Tracked":
        return Tracked(super().__mul__(times), self._origin * times)

    __rmul__ = __mul__

    def join(self, parts: Iterable[str], /) -> "Tracked":
        parts = list(parts)
        return Tracked(super().join(parts), self._origin.join(map(origin_of, parts)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list["Tracked"]:  # type: ignore[override]
        return self._found(super().split(sep, maxsplit), sep or "")

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list["Tracked"]:  # type: ignore[override]
        return self._found(super().rsplit(sep, maxsplit), sep or "")

    def splitlines(self, keepends: bool = False) -> list["Tracked"]:  # type: ignore[override]
        lines = self._found(super().splitlines(True), "")
        return [line[: len(bare)] for line, bare in zip(lines, super().splitlines(keepends), strict=True)]

    def partition(self, sep: str, /) -> tuple["Tracked", "Tracked", "Tracked"]:
        before, found, after = self._found(super().partition(sep), "")
        return before, found, after

    def rpartition(self, sep: str, /) -> tuple["Tracked", "Tracked", "Tracked"]:
        before, found, after = self._found(super().rpartition(sep), "")
        return before, found, after

    def strip(self, chars: str | None = None, /) -> "Tracked":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> "Tracked":
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None, /) -> "Tracked":
        return self[: len(super().rstrip(chars))]

    def removeprefix(self, prefix: str, /) -> "Tracked":
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str, /) -> "Tracked":
        return self[: len(super().removesuffix(suffix))]

    def replace(self, old: str, new: str, /, count: SupportsIndex = -1) -> "Tracked":
        count = count.__index__()
        if count == 0:
            return self
        if old:
            return follow(new).join(self.split(old, count))
        # An empty text is found before each character, and at the end.
        cut = len(self) if count < 0 else min(count - 1, len(self))
        return follow(new).join(["", *self[:cut], self[cut:]])

    def center(self, width: SupportsIndex, fill: str = " ", /) -> "Tracked":
        return Tracked(super().center(width, fill), self._origin.center(width, origin_of(fill)))

    def ljust(self, width: SupportsIndex, fill: str = " ", /) -> "Tracked":
        return Tracked(super().ljust(width, fill), self._origin.ljust(width, origin_of(fill)))

    def rjust(self, width: SupportsIndex, fill: str = " ", /) -> "Tracked":
        return Tracked(super().rjust(width, fill), self._origin.rjust(width, origin_of(fill)))

    def zfill(self, width: SupportsIndex, /) -> "Tracked":
        sign = 1 if self[:1] in ("+", "-") else 0
        zeros = bytes(len(super().zfill(width)) - len(self))
        return Tracked(super().zfill(width), self._origin[:sign] + zeros + self._origin[sign:])

    def upper(self) -> "Tracked":
        return _written(self, str.upper)

    def lower(self) -> "Tracked":
        return _written(self, str.lower)

    def casefold(self) -> "Tracked":
        return _written(self, str.casefold)

    def swapcase(self) -> "Tracked":
        return _written(self, str.swapcase)

    def title(self) -> "Tracked":
        return recased(self, super().title())

    def capitalize(self) -> "Tracked":
        return recased(self, super().capitalize())

    def expandtabs(self, tabsize: SupportsIndex = 8) -> "Tracked":
        return unfollowed(self, super().expandtabs(tabsize))

    def translate(self, table: Any, /) -> "Tracked":
        return Tracked(super().translate(table))

    def _found(self, pieces: Iterable[str], between: str) -> list["Tracked"]:
        """Return pieces of this text, given in order and as plain text. If `between` is empty, they may have whitespace
        between them, but do not begin with it then."""
        found, end = [], 0
        for piece in pieces:
            start = self.find(piece, end)
            found.append(self[start : start + len(piece)])
            end = start + len(piece) + len(between)
        return found


def follow(text: str) -> Tracked:
    """Return a text as one whose operations follow characters. Plain text comes from the template."""
    return text if isinstance(text, Tracked) else Tracked(text, origin_of(text))


def origin_of(text: str) -> bytes:
    """Return a text's origin, one byte a character. Only exact strings are a template's: others came out of a filter or
    function that does not follow characters."""
    if isinstance(text, Tracked):
        return text._origin
    return bytes(len(text)) if type(text) is str else MESSAGE * len(text)


def message_part(text: Tracked, start: int, stop: int) -> str:
    """Return the characters from `start` to `stop` that come from messages."""
    part = str.__getitem__(text, slice(start, stop))
    return "".join(sign for sign, origin in zip(part, text._origin[start:stop], strict=True) if origin == MESSAGE[0])


def recased(text: Tracked, result: str) -> Tracked:
    """Return the text in another case, `result`. No change of case makes a text shorter."""
    return Tracked(result, text._origin) if len(result) == len(text) else unfollowed(text, result)


def unfollowed(text: Tracked, result: str) -> Tracked:
    """Return the result of an operation on this text alone: message text if anything of the text is."""
    return Tracked(result, None if MESSAGE in text._origin else bytes(len(result)))


def origin_when(write: Callable[[str], str], text: Tracked, size: int) -> bytes:
    """Return the origin of what `write` makes of a text, one character after the other: `size` characters."""
    parts = [(str.__getitem__(text, slice(*run.span())), run[0][:1]) for run in _RUN.finditer(text._origin)]
    origin = b"".join(which * len(write(part)) for part, which in parts)
    return origin if len(origin) == size else MESSAGE * size


def track(value: Any) -> Any:
    """Return a value out of messages with its strings, the keys included, as message text."""
    if isinstance(value, str):
        return Tracked(value)
    if isinstance(value, Mapping):
        return {track(key): track(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(map(track, value))
    return value


def leaves(value: Any, sort_keys: bool = False) -> Iterator[Any]:
    """Yield all that a value holds but containers, in the order in which `json` and `repr` write it."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            pairs = sorted(value.items()) if sort_keys else value.items()
            waiting += reversed([*chain.from_iterable(pairs)])
        elif isinstance(value, list | tuple | set):
            waiting += reversed([*value])
        else:
            yield value


def _written(text: Tracked, write: Callable[[str], str]) -> Tracked:
    written = write(text)
    return Tracked(written, origin_when(write, text, len(written)))
