"""Printing lines on stderr, a terminal or a log file: one event on each line, without control characters."""

import sys
from datetime import datetime


def say(message: str) -> None:
    """Print one line. If stderr is not a terminal, the line begins with the local time in ISO 8601."""
    time = "" if sys.stderr.isatty() else f"{datetime.now().astimezone().isoformat(timespec='seconds')} "
    print(f"{time}batchinfer: {printable(message)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Return the text on one line, with escapes for line ends, control characters and other unprintable characters.

    Names of files, columns and models are the user's and may hold any of these.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )
