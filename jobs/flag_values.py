"""Parsing the values of flags: times, numbers, shards, names, and the TOML file of a job."""

import codecs
import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Any, get_args

from batchinfer.errors import UsageError
from batchinfer.flag import Flag, Kind

_UNITS: dict[int, tuple[int, ...]] = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}


def seconds_of(flag: str, text: str) -> float:
    """Parse a time as Slurm does, into seconds.

    The forms are MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, and DAYS-HOURS[:MINUTES[:SECONDS]].

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
    """Parse a whole number, or "auto" as None. Raises `UsageError` for anything else."""
    if text != "auto" and not text.isdecimal():
        raise UsageError(f"{flag} is {text!r}; it must be a whole number, or auto")
    return None if text == "auto" else int(text)


def shard_of(flag: str, text: str) -> tuple[int, int]:
    """Parse "I/N" into (index, count). Raises `UsageError` for anything else."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(count)):
        raise UsageError(f"{flag} is {text!r}; give I/N, with I from 0 to N - 1")
    return int(index), int(count)


def delimiter_of(flag: str, text: str) -> str:
    r"""Parse the delimiter of CSV files, one character; \t is a tab. Raises `UsageError` for anything else."""
    delimiter = "\t" if text == r"\t" else text
    if len(delimiter) != 1 or not delimiter.isascii() or delimiter in "\"'\r\n":
        raise UsageError(
            f"{flag} is {text!r}; give one ASCII character that is neither a quote nor a line end, as ';' or '|', "
            "or \\t for a tab"
        )
    return delimiter


def encoding_of(flag: str, text: str) -> str:
    """Parse the name of a text encoding into the one that Python's codecs use. Raises `UsageError` for anything
    else."""
    try:
        "".encode(text)  # unlike a look-up, this refuses codecs that are not for text
        name = codecs.lookup(text).name
        if name in ("idna", "punycode"):  # they are for names of hosts
            raise LookupError(name)
        return name
    except (LookupError, ValueError) as error:
        raise UsageError(
            f"{flag} is {text!r}, which is no text encoding; give one that Python knows, as cp1252, latin-1 or utf-16"
        ) from error


def names_of(flag: str, texts: Iterable[str]) -> tuple[str, ...]:
    """Split texts at their commas into names."""
    return tuple(name for text in texts for name in text.split(",") if name)


def moment_of(flag: str, text: str) -> datetime:
    """Parse a date, which stands for its midnight, or a date and time, in ISO 8601. Raises `UsageError` for anything
    else, for a time zone, and for a year that is not written in four digits."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = datetime.min
    if moment.year < 1000 or moment.tzinfo is not None:
        raise UsageError(
            f"{flag} is {text!r}; give a date, or a date and time without a time zone, as 2026-11-28 or "
            "2026-11-28T09:30, from the year 1000 on"
        )
    return moment


TIME = Kind("TIME", seconds_of)
NUMBER_OR_AUTO = Kind("N|auto", number_or_auto, none="auto")
SHARD = Kind("I/N", shard_of)
NAMES = Kind("NAME,...", names_of)
DELIMITER = Kind("CHARACTER", delimiter_of)
MOMENT = Kind("DATE", moment_of)
ENCODING = Kind("NAME", encoding_of)


def read_job_file(path: Path, known: Mapping[str, Flag | None], option: str = "--config") -> dict[str, Any]:
    """Read a TOML file of flags. Returns its values by key, with '_' for '-'; paths are relative to the file.

    `known` has the flag of each key, or None for a key with one plain value. Raises `UsageError` for a file that cannot
    be read, an unknown key and a value of a wrong kind.
    """
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # raised by tomllib, also for numbers of 5,000 digits
        raise UsageError(f"{option} {path} is not valid TOML: {error}") from error
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
            raise UsageError(f"{option} {path} has an unknown key {key!r}; the nearest known key is {near[0]!r}")
        if name in values:
            raise UsageError(f"{option} {path} has {name!r} twice, with '-' and with '_'")
        try:
            values[name] = _job_value(path.parent, known[name], value)
        except ValueError as error:
            raise UsageError(f"{option} {path}: {name} is {error}") from error
    return values


def _job_value(folder: Path, flag: Flag | None, value: Any) -> Any:
    if any("\0" in text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)):
        raise ValueError("a text with a NUL character; remove that character")
    if flag is not None and flag.many:
        kinds, named = ((str, int), "token ids") if int in get_args(flag.type) else (str, "texts")
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, kinds) and not isinstance(text, bool) for text in texts):
            raise ValueError(f"{value!r}; expected a text or a list of {named}")
        texts = list(map(str, texts))
        if flag.table:  # nothing in a list is split at its commas
            return [json.dumps(texts)] if isinstance(value, list) else texts
        return [str(folder / text) for text in texts] if flag.is_path else texts
    if flag is not None and flag.table and isinstance(value, dict):
        # A kind parses objects without paths.
        model = {"model": _located(folder, value["model"])} if "model" in value and flag.kind is None else {}
        return json.dumps({**value, **model}, default=str)
    if flag is not None and flag.type is datetime and isinstance(value, date):  # TOML has dates of its own
        return value.isoformat()
    if not isinstance(value, str | int | float):
        raise ValueError(f"a {type(value).__name__}; expected one value")
    if flag is None:
        return value
    if flag.is_path:
        return str(folder / str(value))
    return _located(folder, value) if flag.names_model or flag.names_file else value


def _located(folder: Path, model: Any) -> Any:
    """Return a value as a path relative to the job file's folder if that path exists, else as it is: a name on the Hub,
    or what a file would have."""
    if not isinstance(model, str | int | float):
        raise ValueError(f"a {type(model).__name__}; expected one value")
    return str(folder / str(model)) if os.path.exists(folder / str(model)) else model
