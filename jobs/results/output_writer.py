"""Writing the output, a file or a folder of files of bounded size. It is written aside, and renamed when it is
whole."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from batchinfer.errors import Refused
from batchinfer.host.files import sha256
from batchinfer.jobs.results.durable import sync_folder, writing
from batchinfer.jobs.results.formats import FOLDER_SUFFIX, Rows, format_of, is_folder, suffixes

FILE_BYTES = 1 << 30  # after which a folder's next file begins, before compression


class OutputWriter:
    """A context in which rows are written in order. At its end they are on disk; after any error nothing is left.

    The files of a folder are part-000001.parquet, part-000002.parquet, ...; an output without rows has one file too.
    """

    def __init__(self, output: Path, aside: Path, schema: pa.Schema) -> None:
        """Write to `aside`, which becomes `output` later. The name of `output` decides the format."""
        self._aside, self._schema = aside, schema
        self._folder, self._format = is_folder(output), format_of(output)
        self._files = 0
        self._bytes = 0  # in the file that is open

    def __enter__(self) -> "OutputWriter":
        if self._folder:
            self._aside.mkdir()
        self._open()
        return self

    def write(self, rows: Rows) -> None:
        """Append rows."""
        if self._folder and self._bytes >= FILE_BYTES:
            self._open_file.close()
            self._open()
        self._bytes += rows.nbytes
        self._writer.write(rows)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            with self._open_file:
                if error is not None:
                    raise error
            if self._folder:
                sync_folder(self._aside)
        except BaseException:
            if self._folder:
                shutil.rmtree(self._aside)
            raise

    def _open(self) -> None:
        self._files += 1
        self._bytes = 0
        path = self._aside / f"part-{self._files:06d}{FOLDER_SUFFIX}" if self._folder else self._aside
        with ExitStack() as opened:
            opened.enter_context(writing(path))
            file = opened.enter_context(pa.OSFile(str(path), "wb"))  # a Python file would copy all bytes
            self._writer = opened.enter_context(self._format.open(file, self._schema))
            self._open_file = opened.pop_all()


def publish(aside: Path, output: Path) -> None:
    """Rename `aside` to `output`, replacing an earlier output.

    A file is replaced in one step. A folder is absent for a moment between the earlier one and the new one.
    """
    if output.is_dir() and any(output.iterdir()):
        earlier = aside.with_name(f"{aside.name}-earlier")
        output.rename(earlier)
        aside.rename(output)
        shutil.rmtree(earlier)
    else:
        aside.rename(output)
    sync_folder(output.parent)


def files_of(output: Path) -> list[Path]:
    """Return the files of an output, in the order of their rows."""
    return sorted(output.iterdir()) if output.is_dir() else [output]


def is_there(output: Path) -> bool:
    """Return whether an output exists and is not an empty folder."""
    return output.exists() and bool(files_of(output))


def digest_of(output: Path) -> str:
    """Return the sha256 of an output file; for a folder, the sha256 of its files' names and digests."""
    if not output.is_dir():
        return sha256(output)
    listed = "".join(f"{path.name} {sha256(path)}\n" for path in files_of(output))
    return hashlib.sha256(listed.encode()).hexdigest()


def remove(output: Path) -> None:
    """Remove an output if it exists. Raises `Refused` if it holds files that no run wrote."""
    refuse_foreign(output)
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)


def remove_left(paths: Iterable[Path]) -> None:
    """Remove files and folders that a dead process left aside."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def refuse_foreign(output: Path) -> None:
    """Raise `Refused` if something at `output` must not be replaced: a file where a folder is wanted, a folder where a
    file is wanted, a link, a mount point, or a folder with files that no run wrote."""
    if is_folder(output) and output.exists() and not output.is_dir():
        raise Refused(f"output {output} is a file; name one that ends in {suffixes()}, or a folder")
    if is_folder(output) and (output.is_symlink() or os.path.ismount(output)):
        raise Refused(
            f"output {output} is a link or a mount point, which cannot be replaced by a folder; name the folder that "
            "it "
            "leads to, or a new folder in it"
        )
    if not output.is_dir():
        return
    if not is_folder(output):
        raise Refused(f"output {output} is a directory; expected a file: choose another name, or one without a suffix")
    if others := [path.name for path in files_of(output) if not re.fullmatch(r"part-\d{6}\.parquet", path.name)]:
        raise Refused(f"output {output} holds {others[0]!r}, which no run wrote; choose another folder")
