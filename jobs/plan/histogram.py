"""Counts as bars of text, as wide as the terminal."""

import shutil
import sys
from collections.abc import Mapping

EIGHTHS = " ▏▎▍▌▋▊▉"
PLAIN_WIDTH = 80  # where nobody looks on, as in a file
LEAST_BAR = 10


def terminal_width() -> int | None:
    """Columns of the terminal on stdout; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def bars(counts: Mapping[str, int], width: int | None) -> list[str]:
    """A line a count: label, count and bar, in `width` columns; without a width in plain signs, in 80."""
    if not counts:
        return []
    labels = max(map(len, counts))
    numbers = max(len(f"{count:,}") for count in counts.values())
    room = max(LEAST_BAR, (PLAIN_WIDTH if width is None else width) - labels - numbers - 4)
    most = max(*counts.values(), 1)
    draw = _plain_bar if width is None else _bar
    return [
        f"{label:>{labels}}  {count:>{numbers},}  {draw(count / most * room)}".rstrip()
        for label, count in counts.items()
    ]


def _bar(length: float) -> str:
    whole, part = divmod(round(length * 8), 8)
    return "█" * whole + EIGHTHS[part].strip()


def _plain_bar(length: float) -> str:
    return "#" * round(length)
