"""Lines on stderr, which is a terminal or ends in a log file: one event a line, and nothing in it that is no text."""

import sys
from datetime import datetime


def say(message: str) -> None:
    """Print one line; where stderr is no terminal it begins with the time, in ISO 8601, of the local zone."""
    time = "" if sys.stderr.isatty() else f"{datetime.now().astimezone().isoformat(timespec='seconds')} "
    print(f"{time}batchinfer: {printable(message)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text on one line: escapes in place of line ends, control characters and all else that shows no sign.

    Names of files, columns and models come from outside, and may hold any of them.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )
