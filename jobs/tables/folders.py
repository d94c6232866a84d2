"""Finding the files in an input folder. Subfolders named key=value, as Hive and Spark write them, give columns."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa

from batchinfer.errors import Refused

NULL = "__HIVE_DEFAULT_PARTITION__"  # what such a folder's name has in place of null

Keys = Mapping[str, str | None]  # column -> text of its value


def files_in(path: Path) -> list[tuple[Path, Keys]]:
    """Return the path of a file, or the files in a folder, sorted by name, each with the keys of its subfolders.

    Names that begin with '.' or '_' are left out, since by custom they are not tables.
    """
    if not os.path.isdir(path):
        return [(path, {})]
    found = list(_walk(path, {}))
    if not found:
        raise Refused(f"{path} is a folder without files; expected tables in it")
    return found


def typed(keys: Sequence[Keys]) -> list[dict[str, pa.Scalar]]:
    """Give the keys of all files types, as pyarrow.dataset does: int32 if all values of a key fit it, else text."""
    types = {name: _type([each[name] for each in keys if name in each]) for each in keys for name in each}
    return [{name: pa.scalar(text).cast(types[name]) for name, text in each.items()} for each in keys]


def _walk(folder: Path, keys: Keys) -> Iterator[tuple[Path, Keys]]:
    for entry in sorted(entry for entry in folder.iterdir() if entry.name[0] not in "._"):
        name, sign, value = entry.name.partition("=")
        if sign and entry.is_dir():
            yield from _walk(entry, {**keys, **_key(entry, name, value, keys)})
        else:
            yield entry, keys


def _key(folder: Path, name: str, value: str, above: Keys) -> Keys:
    try:
        name, value = unquote(name, errors="strict"), unquote(value, errors="strict")
    except UnicodeDecodeError as error:
        raise Refused(f"{folder}: its name is not UTF-8 behind the signs '%'; rename it") from error
    if name in above:
        raise Refused(f"{folder} gives the key {name!r}, which a folder above it gives too; rename one of them")
    return {name: None if value == NULL else value}


def _type(values: list[str | None]) -> pa.DataType:
    known = pa.array([value for value in values if value is not None], pa.string())
    if not len(known):
        return pa.null()
    try:
        return known.cast(pa.int32()).type
    except pa.ArrowInvalid:
        return pa.string()
