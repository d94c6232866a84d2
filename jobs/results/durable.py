"""Files that are whole or absent, whenever the machine stops: written aside, synced, then linked or renamed."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from batchinfer.errors import Refused


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An `OSError` from within names this file, if it names none."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A new file, synced at the end, or absent after any error. An `OSError` names it."""
    file = path.open("xb")
    try:
        with naming(path):
            yield file
            file.flush()
            os.fsync(file.fileno())
            file.close()
    except BaseException:
        with suppress(OSError):  # it would write what is left, and fail again
            file.close()
        path.unlink()
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole, by rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with writing(temporary) as file:
        file.write(data)
    temporary.rename(path)
    sync_folder(path.parent)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file whole, by rename."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode())


def link_new(source: Path, target: Path) -> None:
    """Give a file its name, which nobody else may have given before: raises `Refused` then."""
    try:
        os.link(source, target)
    except OSError as error:
        # Over NFS a link may take and its answer be lost: then the file has both names.
        if source.stat().st_nlink == 2:
            return
        if isinstance(error, FileExistsError):
            raise Refused(f"{target} is there already: another run writes to the same output") from error
        raise


def sync_folder(path: Path) -> None:
    """The names in it survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path) -> int | None:
    """A descriptor that holds the file's lock until it is closed or the process ends; None if another one has it.

    It saves two runs the work that only one of them could commit; nothing is correct only because of it, for some
    file systems do not lock: there it is always granted.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass
    return descriptor
