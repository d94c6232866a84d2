"""Values of flags as people write them: times, numbers, shards, and the TOML file of a job."""

import difflib
import json
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from batchinfer.errors import UsageError

_UNITS: dict[int, tuple[int, ...]] = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}


def seconds_of(flag: str, text: str) -> float:
    """A time as Slurm writes it: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, or DAYS-HOURS[:MINUTES[:SECONDS]].

    Raises `UsageError` for anything else.
    """
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        raise UsageError(f"{flag} is {text!r}; give minutes, or [DAYS-]HOURS:MINUTES:SECONDS")
    numbers = [int(part) for part in parts]
    units = _UNITS[3 if dash else len(numbers)]
    return float(sum(n * unit for n, unit in zip(numbers, units, strict=False)) + 86400 * int(days or 0))


def number_or_auto(flag: str, text: str) -> int | None:
    """None for "auto". Raises `UsageError` for what is no number."""
    if text != "auto" and not text.isdecimal():
        raise UsageError(f"{flag} is {text!r}; it must be a number, or auto")
    return None if text == "auto" else int(text)


def shard_of(text: str) -> tuple[int, int]:
    """(index, count) of "I/N". Raises `UsageError` for anything else."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(count)):
        raise UsageError(f"--shard is {text!r}; give I/N, with I from 0 to N - 1")
    return int(index), int(count)


def delimiter_of(text: str) -> str:
    r"""The character between the values of CSV files; \t is a tab. Raises `UsageError` for anything else."""
    delimiter = "\t" if text == r"\t" else text
    if len(delimiter) != 1 or not delimiter.isascii() or delimiter in "\"'\r\n":
        raise UsageError(
            f"--csv-delimiter is {text!r}; give one ASCII character that is no quote and no line end: ';' or '|' say, "
            r"or \t for a tab"
        )
    return delimiter


def read_job_file(path: Path, known: Iterable[str], flag: str = "--config") -> dict[str, Any]:
    """The keys of a TOML file of flags, with '_' for '-'; paths in it are taken relative to it.

    Raises `UsageError` for a file that cannot be read, a key that is not among `known` and a value of a wrong kind.
    """
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # what tomllib raises of its own, and for numbers of 5,000 digits
        raise UsageError(f"{flag} {path} is no valid TOML: {error}") from error
    names = sorted(known)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            raise UsageError(f"{flag} {path} has an unknown key {key!r}; the nearest known key is {near[0]!r}")
        if name in values:
            raise UsageError(f"{flag} {path} has {name!r} twice, with '-' and with '_'")
        try:
            values[name] = _job_value(path.parent, name, value)
        except ValueError as error:
            raise UsageError(f"{flag} {path}: {name} is {error}") from error
    return values


def _job_value(folder: Path, name: str, value: Any) -> Any:
    if any("\0" in text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)):
        raise ValueError("a text with a NUL character; leave it out")
    if name in ("input", "stop", "columns"):
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{value!r}; expected a text or a list of texts")
        return [str(folder / text) for text in texts] if name == "input" else texts
    if name == "speculative_config" and isinstance(value, dict):
        model = {key: _job_value(folder, key, value[key]) for key in ("model",) if key in value}
        return json.dumps({**value, **model}, default=str)
    if not isinstance(value, str | int | float):
        raise ValueError(f"a {type(value).__name__}; expected one value")
    # A model's name may be a Hub id: it is a path only where such a folder is.
    is_path = name in ("output", "metrics_textfile") or (
        name in ("model", "tokenizer", "draft_model", "canary_reference") and os.path.exists(folder / str(value))
    )
    return str(folder / str(value)) if is_path else value
