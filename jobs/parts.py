"""What a job has written: finished rows in parts while it runs, and at the end one table in input order.

`OUT.run/parts/part-N.parquet` holds finished rows, sorted by their ordinal. A part is whole or absent: it is written
aside, synced, and linked into place under the number after the last listed one, so that a second writer fails instead
of overwriting. The rows done are the union of the parts' ordinals. `OUT.parquet` is put there last, by rename.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.jobs.spec import Refused

ROW = "row"  # the input ordinal; only in parts
RESULT_FIELDS = [
    pa.field("generated_text", pa.string()),
    pa.field("finish_reason", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("completion_tokens", pa.int32()),
    pa.field("error_code", pa.string()),
    pa.field("error_message", pa.string()),
]
PART_SCHEMA = pa.schema([pa.field(ROW, pa.int64(), nullable=False), *RESULT_FIELDS])
ROW_GROUP_BYTES = 1 << 18  # of a part: what the merge holds of each part at a time
OUTPUT_GROUP_BYTES = 1 << 25
PARQUET: dict[str, Any] = {"write_page_checksum": True, "compression": "zstd"}
FORMAT_VERSION = 1


class RunFolder:
    """The folder `OUT.run` of the output `OUT.parquet`, and the parts in it."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_suffix(".run")
        self.log = self.path / "worker.log"
        self.report = self.path / "report.json"
        self._parts = self.path / "parts"
        self._temporary = self.path / "tmp"
        self._listed: list[dict[str, Any]] = []
        self._fingerprints: dict[str, str] = {}

    def refuse_existing(self, overwrite: bool) -> None:
        """Raises `Refused` where an earlier result stands in the way."""
        if self.output.is_dir():
            raise Refused(f"output {self.output} is a directory; expected a file that ends in .parquet")
        if self.path.exists() and not self.path.is_dir():
            raise Refused(f"{self.path} is a file; output {self.output} needs a folder of that name for its parts")
        foreign = self.path.is_dir() and any(self.path.iterdir()) and not (self.path / "run.json").exists()
        if foreign:
            raise Refused(f"{self.path} holds files that no run wrote; choose another output or move them away")
        if overwrite:
            return
        if self.output.exists():
            raise Refused(f"output {self.output} exists; choose another one, or give --overwrite to replace it")
        if self.path.is_dir() and any(self.path.iterdir()):
            raise Refused(f"{self.path} holds an unfinished run; give --overwrite to start it again")

    def create(self, run: dict[str, Any], fingerprints: dict[str, str]) -> None:
        """Make the folder anew, with `run.json`: everything resolved. What an earlier run left is removed."""
        self.output.unlink(missing_ok=True)
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        write_json(self.path / "run.json", {**run, "fingerprints": fingerprints})
        self._parts.mkdir()
        self._temporary.mkdir()
        self._fingerprints = fingerprints

    def remove_if_empty(self) -> None:
        """Leave nothing behind where no part was committed."""
        if not self._listed:
            shutil.rmtree(self.path, ignore_errors=True)

    @property
    def committed_rows(self) -> int:
        return sum(part["rows"] for part in self._listed)

    def commit(self, finished: list[pa.RecordBatch]) -> None:
        """Write these rows (`PART_SCHEMA`) as the next part. Raises `OSError`; `Refused` if another run writes here."""
        table = pa.Table.from_batches(finished, PART_SCHEMA)
        order = np.argsort(table[ROW].to_numpy())
        table = table.take(order).replace_schema_metadata({"batchinfer": json.dumps(self._fingerprints)})
        sink = pa.BufferOutputStream()
        group_rows = max(1, len(table) * ROW_GROUP_BYTES // max(1, table.nbytes))
        pq.write_table(table, sink, row_group_size=group_rows, **PARQUET)
        data = sink.getvalue()
        number = len(self._listed) + 1
        temporary = self._temporary / f"w-{number}"
        part = self._parts / f"part-{number:06d}.parquet"
        with _writing(temporary) as file:
            file.write(data)
        _link(temporary, part)
        _sync_folder(self._parts)
        temporary.unlink()
        self._listed.append(
            {
                "name": part.name,
                "rows": len(table),
                "first_row": table[ROW][0].as_py(),
                "last_row": table[ROW][-1].as_py(),
                "finish_reasons": dict(Counter(table["finish_reason"].to_pylist())),
                "bytes": data.size,
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )

    def write_manifest(self) -> None:
        """List the parts, once all rows are done."""
        manifest = {
            "format_version": FORMAT_VERSION,
            "rows": self.committed_rows,
            "fingerprints": self._fingerprints,
            "parts": self._listed,
        }
        write_json(self.path / "manifest.json", manifest)

    def merge(self, schema: pa.Schema, batches: Iterable[tuple[int, pa.RecordBatch]]) -> Path:
        """The input's kept columns and the parts side by side, in input order, in a file aside; returns it.

        `batches` are (first ordinal, columns of `schema`), in order. Holds a batch, and a row group of each part whose
        range of ordinals is being passed. Raises `Refused` where the input is not the one that was run.
        """
        aside = self._temporary / "merged.parquet"
        parts = _PartsInOrder([(self._parts / part["name"], part["first_row"]) for part in self._listed])
        merged_schema = pa.schema([*schema, *RESULT_FIELDS])
        end = 0
        with _writing(aside) as file, pq.ParquetWriter(file, merged_schema, **PARQUET) as writer:
            waiting: list[pa.Table] = []
            for first, batch in batches:
                end = first + len(batch)
                results = parts.take(first, end)
                if results is None:
                    raise Refused(f"the input changed while it was run: rows {first} to {end - 1} do not match")
                waiting.append(pa.Table.from_arrays([*batch.columns, *results.columns[1:]], schema=merged_schema))
                if sum(table.nbytes for table in waiting) >= OUTPUT_GROUP_BYTES:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting.clear()
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
            if end != self.committed_rows:
                raise Refused(
                    f"the input changed while it was run: it had {self.committed_rows} rows, now it has {end}"
                )
        return aside

    def publish(self, aside: Path) -> None:
        """Put the merged table in its place: from now on the job is complete."""
        aside.rename(self.output)
        _sync_folder(self.output.parent)
        self._temporary.rmdir()


class _PartsInOrder:
    """Reads all parts side by side by ascending ordinal; opens a part when its first ordinal comes up."""

    def __init__(self, parts: list[tuple[Path, int]]) -> None:
        self._later = sorted(parts, key=lambda part: part[1], reverse=True)
        self._open: list[_Cursor] = []

    def take(self, first: int, end: int) -> pa.Table | None:
        """The rows from `first` to before `end`, in order; None unless each is there exactly once."""
        while self._later and self._later[-1][1] < end:
            self._open.append(_Cursor(self._later.pop()[0]))
        table = pa.concat_tables([PART_SCHEMA.empty_table(), *(t for cursor in self._open for t in cursor.below(end))])
        self._open = [cursor for cursor in self._open if not cursor.exhausted]
        rows = table[ROW].to_numpy()
        order = np.argsort(rows)
        if not np.array_equal(rows[order], np.arange(first, end)):
            return None
        return table.take(order).combine_chunks()


class _Cursor:
    """One part, a row group at a time; no file stays open in between, since a job may have thousands of parts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._metadata = pq.read_metadata(path)
        self._next_group = 0
        self._table = PART_SCHEMA.empty_table()

    @property
    def exhausted(self) -> bool:
        return not len(self._table) and self._next_group == self._metadata.num_row_groups

    def below(self, end: int) -> Iterator[pa.Table]:
        """The rows not yet given whose ordinals are below `end`."""
        while not self.exhausted:
            if not len(self._table):
                self._table = self._read(self._next_group)
                self._next_group += 1
            count = int(np.searchsorted(self._table[ROW].to_numpy(), end))
            yield self._table.slice(0, count)
            self._table = self._table.slice(count)
            if len(self._table):
                return

    def _read(self, group: int) -> pa.Table:
        try:
            with pq.ParquetFile(
                self._path, metadata=self._metadata, page_checksum_verification=True, pre_buffer=False
            ) as file:
                return file.read_row_group(group, use_threads=False).replace_schema_metadata(None)
        except (OSError, pa.ArrowException) as error:
            raise OSError(f"part {self._path} is damaged: {error}") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file whole, by rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with _writing(temporary) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode())
    temporary.rename(path)
    _sync_folder(path.parent)


@contextmanager
def _writing(path: Path) -> Iterator[BinaryIO]:
    """A new file, synced at the end, or absent after any error. An `OSError` names it."""
    with path.open("xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        except BaseException as error:
            path.unlink()
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        # Over NFS a link may take and its answer be lost: then the file has both names.
        if source.stat().st_nlink == 2:
            return
        if isinstance(error, FileExistsError):
            raise Refused(f"{target} is there already: another run writes to the same output") from error
        raise


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
