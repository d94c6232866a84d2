"""Drawing counts as bars of text."""

import shutil
import sys
from collections.abc import Mapping

EIGHTHS = " ▏▎▍▌▋▊▉"
PLAIN_WIDTH = 80  # if the output is not a terminal
LEAST_BAR = 10


def terminal_width() -> int | None:
    """Return the number of columns of the terminal on stdout, or None if stdout is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def bars(counts: Mapping[str, int], width: int | None) -> list[str]:
    """Return a line for each count: label, count and bar, in `width` columns; for None, in ASCII and 80 columns."""
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
