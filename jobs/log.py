"""Printing lines on stderr, a terminal or a log file: one event on each line, as text or as a JSON object.

Lines never have text of rows. How they are written is a choice for the whole process, as stderr is one.
"""

import json
import sys
from datetime import datetime
from itertools import pairwise
from typing import Any

FORMATS = ("text", "json")
ERROR = "batchinfer: error: "

_chosen = FORMATS[0]


def write_as(log_format: str) -> None:
    """Write all further lines in this format, one of `FORMATS`."""
    global _chosen
    _chosen = log_format


def writes_json() -> bool:
    """Return whether lines are JSON objects."""
    return _chosen == "json"


def asked_for(arguments: list[str]) -> str:
    """Return the format that a command line asks for, also one that is wrong otherwise."""
    pairs = pairwise(arguments)
    return "json" if "--log-format=json" in arguments or ("--log-format", "json") in pairs else "text"


def say(message: str, event: str = "note", level: str = "info", **fields: Any) -> None:
    """Print one line. As text it begins with the local time in ISO 8601 if stderr is not a terminal.

    As JSON it has `time`, `level` (info, warning or error), `event`, `message`, and these fields, which JSON must know.
    """
    if writes_json():
        _print_object(event, level, message, fields)
        return
    time = "" if sys.stderr.isatty() else f"{_now()} "
    print(f"{time}batchinfer: {printable(message)}", file=sys.stderr, flush=True)


def say_error(message: str, exit_code: int) -> None:
    """Print the line of the error that ends a command."""
    if writes_json():
        _print_object("error", "error", message, {"exit_code": exit_code})
    else:
        print(f"{ERROR}{printable(message)}", file=sys.stderr)


def message_of(line: str) -> str:
    """Return the message of a line that was printed as the error of a command, in either format."""
    try:
        return str(json.loads(line)["message"])
    except (ValueError, TypeError, KeyError):
        return line.removeprefix(ERROR)


def printable(text: str) -> str:
    """Return the text on one line, with escapes for line ends, control characters and other unprintable characters.

    Names of files, columns and models are the user's and may hold any of these.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def _print_object(event: str, level: str, message: str, fields: dict[str, Any]) -> None:
    line = {"time": _now(), "level": level, "event": event, "message": message, **fields}
    print(json.dumps(line, default=str), file=sys.stderr, flush=True)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
