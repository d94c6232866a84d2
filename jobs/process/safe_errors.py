"""Describing unexpected errors without showing any row's text in logs or messages.

A library may quote its input in the text of an error. So the text is shown only if the error was raised in code that
handles nothing but numbers. Of any other error, the type, the module and the line are shown.
"""

import traceback
from collections.abc import Iterator

from batchinfer.errors import EngineFailed, Interrupted, Refused, UsageError

_NUMBERS = ("torch", "triton", "batchinfer")
_TEXTS = ("batchinfer.jobs", "batchinfer.text")


def told(error: BaseException) -> str:
    """Return what users are told of the error that ended a command."""
    if isinstance(error, UsageError | Refused | EngineFailed | Interrupted):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return f"internal: {described(error)}" if isinstance(error, Exception) else type(error).__name__


def described(error: BaseException) -> str:
    """Return the error's type and text; or its type, module and line, if the text might quote a row."""
    kind = type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return f"{kind}: {error.strerror}"
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return kind
    frame, line = frames[-1]
    module = str(frame.f_globals.get("__name__"))
    if _within(module, _NUMBERS) and not _within(module, _TEXTS):
        return f"{kind}: {error}"
    return f"{kind} in {module}, line {line} (the error's text is left out, since it might quote a prompt)"


def traced(error: BaseException) -> Iterator[str]:
    """Yield the traceback as Python prints it, with the errors that led to it; each error is shown by `described`."""
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if earlier is not None:
        yield from traced(earlier)
        yield "\nwhich led to:\n\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    yield f"{described(error)}\n"


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)
