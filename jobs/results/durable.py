"""Writing files that are whole or absent even if the machine stops: written aside, synced, then linked or renamed."""

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
    """Add this file's name to an `OSError` that is raised inside and names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for writing. It is synced at the end, and removed after any error. An `OSError` names it."""
    file = path.open("xb")
    try:
        with naming(path):
            yield file
            file.flush()
            os.fsync(file.fileno())
            file.close()
    except BaseException:
        with suppress(OSError):  # closing writes the buffered rest, which fails again
            file.close()
        path.unlink()
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is whole or unchanged, by rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with writing(temporary) as file:
        file.write(data)
    temporary.rename(path)
    sync_folder(path.parent)


def replace_unsynced(path: Path, data: bytes) -> None:
    """Write a file by rename, so that readers find it whole. After a loss of power it may be empty."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.rename(path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file so that it is whole or unchanged, by rename."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode())


def link_new(source: Path, target: Path) -> None:
    """Give the file `source` the name `target` too. Raises `Refused` if another process made a file of that name."""
    try:
        os.link(source, target)
    except OSError as error:
        # Over NFS the link may be made and the reply be lost. Then the file has both names, and all is well.
        if source.stat().st_nlink == 2:
            return
        if isinstance(error, FileExistsError):
            raise Refused(
                f"{target} exists already: another run writes to the same output; wait until it ends, or stop it"
            ) from error
        raise


def sync_folder(path: Path) -> None:
    """Sync a folder, so that the names in it survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path) -> int | None:
    """Lock a file. Returns a descriptor that holds the lock until it is closed or the process ends, or None if another
    process holds it.

    The lock keeps a second run from doing work that it could not commit. Correctness does not depend on it: on file
    systems without locks it is always granted.
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
