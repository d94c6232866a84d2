"""Files of a checkpoint: JSON objects, checksums of weights, git-lfs pointers."""

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

SUMS_NAME = "SHA256SUMS"  # in the format that `sha256sum` writes and `sha256sum --check` reads
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/]+)")
_DIGEST = re.compile("[0-9a-f]{64}")
_POINTER = b"version https://git-lfs"


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises `OSError` if the file is missing, and `ValueError` if it holds something else.
    """
    refuse_pointer(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected an object")
    return value


class KeyTwice(ValueError):
    """An object in JSON has a key twice. The message quotes nothing of it."""


def keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object, as `json.loads(..., object_pairs_hook=keys_once)`. Raises `KeyTwice`."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise KeyTwice("it has a key twice")
    return made


def refuse_pointer(path: Path) -> None:
    """Raise `ValueError`, with the remedy, if the file is a git-lfs pointer."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in that folder")


class Checksums:
    """Checksums of files, computed in a thread of their own while the files are loaded.

    The expected sha256 of a file is its line in `SHA256SUMS` beside it. In the Hub's cache it is the name of the blob
    that the file links to. Files with neither are not checked. Raises `ValueError` for a malformed line of
    `SHA256SUMS`.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        expected = {file: digest for file in sorted(set(files)) if (digest := _expected(file)) is not None}
        thread = ThreadPoolExecutor(1)
        self._found: dict[Path, tuple[str, Future[str]]] = {
            file: (digest, thread.submit(sha256, file)) for file, digest in expected.items()
        }
        thread.shutdown(wait=False)

    def check(self) -> None:
        """Wait for the checksums. Raises `ValueError` naming a file whose checksum is wrong."""
        for file, (expected, found) in self._found.items():
            if found.result() != expected:
                raise ValueError(
                    f"{file} is damaged: its sha256 is {found.result()}, but {_source(file)} says {expected}; fetch or "
                    "copy it again"
                )


def sha256(file: Path) -> str:
    """Return the sha256 of a file's bytes as hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_checksums(folder: Path, files: Iterable[Path]) -> None:
    """Write `SHA256SUMS` for these files, which are in the folder."""
    (folder / SUMS_NAME).write_text("".join(f"{sha256(file)}  {file.name}\n" for file in files))


def _expected(file: Path) -> str | None:
    sums = file.parent / SUMS_NAME
    if sums.is_file():
        return _listed(sums).get(file.name)
    blob = file.resolve()
    return blob.name if blob.parent.name == "blobs" and _DIGEST.fullmatch(blob.name) else None


def _listed(sums: Path) -> dict[str, str]:
    lines = sums.read_text("utf-8", "replace").splitlines()
    found = [_LINE.fullmatch(line) for line in lines]
    for line, match in zip(lines, found, strict=True):
        if match is None:
            raise ValueError(f"{sums}: {line[:50]!a} is not a sha256, two spaces and a file name; remove {SUMS_NAME}")
    return {match[2]: match[1] for match in found if match is not None}


def _source(file: Path) -> str:
    return str(file.parent / SUMS_NAME) if (file.parent / SUMS_NAME).is_file() else "its name in the Hub's cache"
