"""What may be said of an unexpected error: logs and messages hold no text of a row.

Any library may put what it was given into its error's text. So a text counts only where the error comes from code that
has numbers alone; of others the type and the place are said.
"""

import traceback
from collections.abc import Iterator

_NUMBERS = ("torch", "triton", "batchinfer")
_TEXTS = ("batchinfer.jobs", "batchinfer.text")


def described(error: BaseException) -> str:
    """The type and the text; or the type and the place, where the text might be a row's."""
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
    return f"{kind} in {module}, line {line} (its text is left out: it might hold a prompt's)"


def traced(error: BaseException) -> Iterator[str]:
    """As Python prints it, with those that led to it, each as it is `described`."""
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if earlier is not None:
        yield from traced(earlier)
        yield "\nwhich led to:\n\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    yield f"{described(error)}\n"


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)
