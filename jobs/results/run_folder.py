"""What a job has written: finished rows in parts while it runs, and at the end one table in input order.

`OUT.run/parts/part-N.parquet` holds finished rows, sorted by their ordinal. A part is whole or absent: it is written
aside, synced, and linked into place under the number after the last listed one, so that a second writer fails instead
of overwriting. The rows done are the union of the parts' ordinals. The output is put there last, by rename.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import Interrupted, Refused
from batchinfer.jobs.results.done import Done, Part, differences, read_done
from batchinfer.jobs.results.durable import link_new, lock, sync_folder, write_json, writing
from batchinfer.jobs.results.output_writer import (
    OutputWriter,
    digest_of,
    is_there,
    publish,
    refuse_foreign,
    remove,
    remove_left,
)
from batchinfer.jobs.results.parts_in_order import PartsInOrder
from batchinfer.jobs.results.schema import PARQUET, ROW, part_schema, result_fields

ROW_GROUP_BYTES = 1 << 18  # of a part: what the merge holds of each part at a time
FORMAT_VERSION = 2
BEFORE_A_RUN = {"run.json.tmp", "lock"}  # what may be there of a run that was killed before it began


def run_folder(output: Path) -> Path:
    """`OUT.run` beside an output; of a file in a folder that grows, `FILE.run` in that folder's own."""
    rows = rows_of(output)
    return rows.with_name(f"{output.stem}.run") if rows.exists() else output.parent / f"{output.stem}.run"


def rows_of(part: Path) -> Path:
    """Where the rows of a file in a folder that grows are set aside before they run."""
    folder = part.parent.absolute()
    return folder.parent / f"{folder.name}.run" / f"{part.stem}.rows.parquet"


def grown_files(output: Path) -> list[Path]:
    """The files of a folder that grows, the unfinished one too; none of any other output."""
    rows = sorted((output.parent / f"{output.stem}.run").glob("part-*.rows.parquet"))
    return [output / f"{path.name.partition('.')[0]}.parquet" for path in rows]


class RunFolder:
    """The folder `OUT.run` of the output `OUT.parquet`, or of another suffix, and the parts in it."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = run_folder(output)
        self.log = self.path / "worker.log"
        self.report = self.path / "report.json"
        self.manifest = self.path / "manifest.json"
        self._run = self.path / "run.json"
        self.parts = self.path / "parts"
        self.temporary = self.path / "tmp"  # for files that are none of the run's own yet; emptied when one begins
        self._listed: list[Part] = []
        self._fingerprints: dict[str, str] = {}
        self._lock: int | None = None

    def refuse_foreign(self) -> None:
        """Raises `Refused` where something stands in the way that no run wrote."""
        refuse_foreign(self.output)
        for path in (self.output, self.path):
            if path.is_symlink() and not path.exists():
                raise Refused(f"{path} is a link that leads nowhere; remove it, or choose another output")
        if self.path.exists() and not self.path.is_dir():
            raise Refused(f"{self.path} is a file; output {self.output} needs a folder of that name for its parts")
        if any(self.path.glob("*.rows.parquet")):
            raise Refused(f"{self.path} was begun with --incremental; give it again, or choose another output")
        unknown = self.path.is_dir() and not self._run.exists()
        if unknown and {entry.name for entry in self.path.iterdir()} - BEFORE_A_RUN:
            raise Refused(f"{self.path} holds files that no run wrote; choose another output or move them away")

    @property
    def begun(self) -> bool:
        """True if an earlier run has left anything, be it the output alone."""
        return self._run.exists() or is_there(self.output)

    def open(
        self, run: dict[str, Any], fingerprints: dict[str, str], num_rows: int, overwrite: bool, retry_errors: bool
    ) -> Done:
        """Begin the run, or go on with it: what it has done already. `run` is everything resolved, for `run.json`.

        With `overwrite` what an earlier run left is removed. Raises `Refused` where that was another job, and
        `Interrupted` where another process is at work on it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.path / "lock")
        if self._lock is None:
            raise Interrupted(f"another run is at work in {self.path}; nothing was done")
        self._fingerprints = fingerprints
        if overwrite:
            self._remove_all()
        if not self.begun:
            write_json(self._run, {**run, "fingerprints": fingerprints})
        self._refuse_another_job(fingerprints)
        for folder in (self.parts, self.temporary):
            folder.mkdir(exist_ok=True)
        remove_left(self.temporary.iterdir())
        done = read_done(self.parts, num_rows, fingerprints, retry_errors)
        self._listed = done.parts
        return done

    def read(self, fingerprints: dict[str, str], num_rows: int, retry_errors: bool) -> Done:
        """What an earlier run has done, if there was one; nothing is changed. Raises `Refused` as `open` does."""
        if self.begun:
            self._refuse_another_job(fingerprints)
        return read_done(self.parts, num_rows, fingerprints, retry_errors)

    @property
    def taken(self) -> bool:
        """True if another run is at work here."""
        path = self.path / "lock"
        if self._lock is not None or not path.exists():
            return False
        free = lock(path)
        if free is not None:
            os.close(free)
        return free is None

    def close(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _refuse_another_job(self, fingerprints: dict[str, str]) -> None:
        if not self._run.exists():
            raise Refused(f"output {self.output} exists; choose another one, or give --overwrite to replace it")
        try:
            before = json.loads(self._run.read_text("utf-8"))["fingerprints"]
            differing = differences(before, fingerprints)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Refused(f"{self._run} is damaged: give --overwrite to start anew") from error
        if differing:
            raise Refused(
                f"{self.path} was begun with another {' and '.join(differing)}; give the same command to go on, "
                "another output, or --overwrite to start anew"
            )

    def _remove_all(self) -> None:
        """`run.json` last: as long as it is there the folder is known as a run's."""
        remove(self.output)
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in ("lock", self._run.name):
                entry.unlink()
        self._run.unlink(missing_ok=True)

    @property
    def published(self) -> bool:
        """True if the output is there as its report says, made of all the parts that there are."""
        try:
            listed = json.loads(self.manifest.read_text("utf-8"))["parts"]
            digest = json.loads(self.report.read_text("utf-8"))["output_sha256"]
        except (OSError, ValueError, TypeError, KeyError):
            return False
        made_of_all = listed == [part.listed() for part in self._listed]
        return made_of_all and is_there(self.output) and digest_of(self.output) == digest

    def remove_if_empty(self) -> None:
        """Leave nothing behind where no part was committed."""
        if not self._listed:
            shutil.rmtree(self.path, ignore_errors=True)

    def commit(self, finished: list[pa.RecordBatch]) -> None:
        """Write these rows (`part_schema`) as the next part. Raises `OSError`; `Refused` if another run writes here."""
        table = pa.Table.from_batches(finished)
        rows = table[ROW].to_numpy()
        order = np.argsort(rows)
        assert (np.diff(rows[order]) > 0).all(), "a row ends once"
        table = table.take(order).replace_schema_metadata({"batchinfer": json.dumps(self._fingerprints)})
        sink = pa.BufferOutputStream()
        group_rows = max(1, len(table) * ROW_GROUP_BYTES // max(1, table.nbytes))
        pq.write_table(table, sink, row_group_size=group_rows, **PARQUET)
        data = sink.getvalue()
        part = self.parts / f"part-{self._next_number():06d}.parquet"
        temporary = self.temporary / f"{part.stem}-{os.getpid()}"
        with writing(temporary) as file:
            file.write(data)
        link_new(temporary, part)
        sync_folder(self.parts)
        temporary.unlink()
        self._listed.append(Part.of(part.name, table, data.size, hashlib.sha256(data).hexdigest()))

    def _next_number(self) -> int:
        return int(self._listed[-1].name[5:11]) + 1 if self._listed else 1

    def write_manifest(self, num_rows: int) -> None:
        """List the parts, once all rows are done; what an earlier run reported is no more."""
        self.report.unlink(missing_ok=True)
        sync_folder(self.path)
        manifest = {
            "format_version": FORMAT_VERSION,
            "rows": num_rows,
            "fingerprints": self._fingerprints,
            "parts": [part.listed() for part in self._listed],
        }
        write_json(self.manifest, manifest)

    def merge(
        self, schema: pa.Schema, batches: Iterable[tuple[int, pa.RecordBatch]], num_rows: int, samples: int = 1
    ) -> Path:
        """The input's kept columns and the parts side by side, in input order, in a file or folder aside; returns it.

        `batches` are (first ordinal, columns of `schema`), in order; `samples` those that the parts have of a row.
        Holds a batch, and a row group of each part whose range of ordinals is being passed. Raises `Refused` where the
        input is not the one that was run.
        """
        aside = self.temporary / f"merged{self.output.suffix}"
        listed = [(self.parts / part.name, part.first_row) for part in self._listed]
        parts = PartsInOrder(listed, part_schema(samples))
        merged_schema = pa.schema([*schema, *result_fields(samples)])
        end = 0
        with OutputWriter(self.output, aside, merged_schema) as writer:
            for first, batch in batches:
                end = first + len(batch)
                results = parts.take(first, end)
                if results is None:
                    raise Refused(f"the input changed while it was run: rows {first} to {end - 1} do not match")
                writer.write(pa.Table.from_arrays([*batch.columns, *results.columns[1:]], schema=merged_schema))
            if end != num_rows:
                raise Refused(f"the input changed while it was run: it had {num_rows} rows, now it has {end}")
        return aside

    def publish(self, aside: Path) -> None:
        """Give the merged rows the output's name: from now on the job is complete."""
        publish(aside, self.output)
