"""Files of a checkpoint: JSON objects, checksums of weights, pointers of git-lfs."""

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

SUMS_NAME = "SHA256SUMS"  # as `sha256sum` writes it and `sha256sum --check` reads it
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/]+)")
_DIGEST = re.compile("[0-9a-f]{64}")
_POINTER = b"version https://git-lfs"


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file. A `ValueError` names the file and what it is instead; an `OSError` if it is not there."""
    refuse_pointer(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected an object")
    return value


def refuse_pointer(path: Path) -> None:
    """A `ValueError` with the remedy if the file is a git-lfs pointer."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in that folder")


class Checksums:
    """The sha256 of each file, in a thread beside the one that loads them.

    What it must be stands in `SHA256SUMS` beside the file; in a cache of the Hub it is the name of the file that the
    link leads to. A file with neither is not looked at. A `ValueError` names a line of `SHA256SUMS` that is none.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        expected = {file: digest for file in sorted(set(files)) if (digest := _expected(file)) is not None}
        thread = ThreadPoolExecutor(1)
        self._found: dict[Path, tuple[str, Future[str]]] = {
            file: (digest, thread.submit(sha256, file)) for file, digest in expected.items()
        }
        thread.shutdown(wait=False)

    def check(self) -> None:
        """Wait for them. A `ValueError` names a file that is damaged."""
        for file, (expected, found) in self._found.items():
            if found.result() != expected:
                raise ValueError(
                    f"{file} is damaged: its sha256 is {found.result()}, but {_source(file)} says {expected}; fetch or "
                    "copy it again"
                )


def sha256(file: Path) -> str:
    """Of the file's bytes, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_checksums(folder: Path, files: Iterable[Path]) -> None:
    """`SHA256SUMS` of files in the folder."""
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
            raise ValueError(f"{sums}: {line[:50]!a} is no sha256, two spaces and a file's name; remove the file")
    return {match[2]: match[1] for match in found if match is not None}


def _source(file: Path) -> str:
    return str(file.parent / SUMS_NAME) if (file.parent / SUMS_NAME).is_file() else "its name in the Hub's cache"
