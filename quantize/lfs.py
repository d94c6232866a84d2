"""Pointers of git-lfs, which lie where a file should be when a repository was cloned without it. Free of torch."""

from pathlib import Path

_BEGINNING = b"version https://git-lfs"


def refuse_pointer(path: Path) -> None:
    """A `ValueError` with the remedy if the file is a git-lfs pointer."""
    with path.open("rb") as file:
        if file.read(len(_BEGINNING)) == _BEGINNING:
            raise ValueError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in that folder")
