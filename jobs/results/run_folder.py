"""The run folder `OUT.run` beside an output: it holds finished rows in parts until the output is merged from them.

`OUT.run/parts/part-N.parquet` holds finished rows, sorted by their ordinal. A part is whole or absent: it is written
aside, synced, and linked to its name, whose number follows that of the last part. So a second writer fails instead of
overwriting it. A row is done if its ordinal is in a part. At the end the output is put in place by rename.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import Interrupted, Refused
from batchinfer.jobs.results.done import Done, Part, differences, in_words, read_done
from batchinfer.jobs.results.durable import link_new, lock, sync_folder, write_json, writing
from batchinfer.jobs.results.glance import Glance
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
from batchinfer.jobs.results.schema import PARQUET, RESULT_FIELDS, ROW, keyless, part_schema
from batchinfer.jobs.results.schema_notes import with_notes
from batchinfer.kernels.cpu_library import REFERENCE

ROW_GROUP_BYTES = 1 << 18  # size of a part's row groups; the merge holds one of each part at a time
FORMAT_VERSION = 2
# A run that was killed before it began may leave these.
BEFORE_A_RUN = {"run.json.tmp", "lock", "heartbeat.json", "heartbeat.json.tmp"}
OF_A_MERGE = {"report.json", "report.html", "timeline.json", "README.md"}  # beside an output that was merged of shards


def run_folder(output: Path) -> Path:
    """Return the run folder of an output, `OUT.run` beside it. For a file of an incremental output, it is `FILE.run` in
    the run folder of the output folder."""
    rows = rows_of(output)
    return rows.with_name(f"{output.stem}.run") if rows.exists() else output.parent / f"{output.stem}.run"


def rows_of(part: Path) -> Path:
    """Return the path at which the rows for a file of an incremental output are set aside before they run."""
    folder = part.parent.absolute()
    return folder.parent / f"{folder.name}.run" / f"{part.stem}.rows.parquet"


def incremental_files(output: Path) -> list[Path]:
    """Return the files of an incremental output, also an unfinished one; an empty list for any other output."""
    rows = sorted((output.parent / f"{output.stem}.run").glob("part-*.rows.parquet"))
    return [output / f"{path.name.partition('.')[0]}.parquet" for path in rows]


class Rewriting(Protocol):
    """Makes the output's rows of merged rows, in outputs of another form."""

    @property
    def schema(self) -> pa.Schema:
        """The output's columns."""

    def of(self, first: int, rows: pa.Table) -> pa.Table:
        """Return as many rows, made of those from ordinal `first` on."""


class RunFolder:
    """The run folder of an output, with its parts, manifest, report and log."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = run_folder(output)
        self.log = self.path / "worker.log"
        self.report = self.path / "report.json"
        self.page = self.path / "report.html"
        self.timeline = self.path / "timeline.json"
        self.card = self.path / "README.md"
        self.heartbeat = self.path / "heartbeat.json"
        self.manifest = self.path / "manifest.json"
        self._run = self.path / "run.json"
        self.growth = self.path / "growth.json"  # what all runs of an incremental job have in common
        self.parts = self.path / "parts"
        self.temporary = self.path / "tmp"  # for files that are being written; emptied when a run begins
        self._listed: list[Part] = []
        self._fingerprints: dict[str, str] = {}
        self._lock: int | None = None

    def refuse_foreign(self) -> None:
        """Raise `Refused` if the output's or the run folder's path has something that no run wrote."""
        refuse_foreign(self.output)
        for path in (self.output, self.path):
            if path.is_symlink() and not path.exists():
                raise Refused(f"{path} is a link that leads nowhere; remove it, or choose another output")
        if self.path.exists() and not self.path.is_dir():
            raise Refused(
                f"{self.path} is a file; output {self.output} needs a folder of that name for its parts: choose "
                "another output"
            )
        if any(self.path.glob("*.rows.parquet")):
            raise Refused(f"{self.path} was begun with --incremental; give that flag again, or choose another output")
        unknown = self.path.is_dir() and not self._run.exists()
        if unknown and {entry.name for entry in self.path.iterdir()} - BEFORE_A_RUN - OF_A_MERGE:
            raise Refused(f"{self.path} holds files that no run wrote; choose another output or move them away")

    def refuse_unbegun(self) -> None:
        """Raise `Refused` if no run has left a run folder here."""
        if not (self.begun and self.path.exists()):
            raise Refused(
                f"no job has begun at {self.output}: there is no {self.path}; give the output of a job as its -o"
            )

    @property
    def begun(self) -> bool:
        """True if an earlier run has left a run folder or an output."""
        return self._run.exists() or is_there(self.output)

    @property
    def unfinished(self) -> bool:
        """True if an earlier run has left rows and no output."""
        return self._run.exists() and not is_there(self.output)

    @property
    def template_date(self) -> datetime | None:
        """The moment that the chat template takes for now in the run that began here; None if its prompts have none."""
        try:
            return datetime.fromisoformat(json.loads(self._run.read_text("utf-8"))["fingerprints"]["template_date"])
        except (OSError, ValueError, TypeError, KeyError):  # `open` refuses a damaged file
            return None

    @property
    def prompt_template(self) -> str | None:
        """The prompt template of the run that began here, as it was run, or of the runs of an incremental job; None if
        there is none."""
        for file in (self._run, self.growth):
            try:
                found = json.loads(file.read_text("utf-8"))
                template = (found["spec"] if file == self._run else found)["prompt_template"]
            except (OSError, ValueError, TypeError, KeyError):  # a damaged file is refused where it is needed
                continue
            return template if isinstance(template, str) else None
        return None

    @property
    def created(self) -> int:
        """When the run began here, in seconds since 1970, also if it was resumed since."""
        return int(json.loads(self._run.read_text("utf-8"))["created"])

    def take(self) -> None:
        """Make the folder, and lock it until `close`. Raises `Interrupted` if another run is at work here."""
        if self._lock is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.path / "lock")
        if self._lock is None:
            raise Interrupted(f"another run is at work in {self.path}; nothing was done: try again when it has ended")

    @contextmanager
    def taken_before_open(self) -> Iterator[None]:
        """Take the folder for work before `open`. If that fails, what was made is removed, but no earlier run's."""
        self.take()
        try:
            yield
        except BaseException:
            if not self.begun:
                for name in BEFORE_A_RUN:
                    (self.path / name).unlink(missing_ok=True)
                with suppress(OSError):  # somebody else has put a file there
                    self.path.rmdir()
            raise

    def open(
        self, run: dict[str, Any], fingerprints: dict[str, str], num_rows: int, overwrite: bool, retry_errors: bool
    ) -> Done:
        """Begin a run, or continue an earlier one. Returns the rows that are done already.

        `run` has all resolved settings, for `run.json`. With `overwrite`, the files of an earlier run are removed
        first. Raises `Refused` if the earlier run was of another job, and `Interrupted` if another run is at work here.
        """
        self.take()
        self._fingerprints = fingerprints
        if overwrite:
            remove(self.output)
        if overwrite or not self.begun:
            self.clear()
            write_json(self._run, {**run, "fingerprints": fingerprints})
        self._refuse_another_job(fingerprints)
        for folder in (self.parts, self.temporary):
            folder.mkdir(exist_ok=True)
        remove_left(self.temporary.iterdir())
        done = read_done(self.parts, num_rows, fingerprints, retry_errors)
        self._listed = done.parts
        return done

    def read(self, fingerprints: dict[str, str], num_rows: int, retry_errors: bool) -> Done:
        """Return the rows that an earlier run has done, if there was one, and change nothing. Raises as `open` does."""
        if self.begun:
            self._refuse_another_job(fingerprints)
        return read_done(self.parts, num_rows, fingerprints, retry_errors)

    @property
    def taken(self) -> bool:
        """True if another run is at work in this folder."""
        path = self.path / "lock"
        if self._lock is not None or not path.exists():
            return False
        free = lock(path)
        if free is not None:
            os.close(free)
        return free is None

    def close(self) -> None:
        """Release the folder's lock, so that another run can begin."""
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
            raise Refused(f"{self._run} is damaged; give --overwrite to start anew") from error
        if differing:
            if "cpu_path" in differing:  # chosen by the machine, unless a flag says which
                differing[differing.index("cpu_path")] = f"cpu_path (--cpu-path {before.get('cpu_path', REFERENCE)})"
            raise Refused(
                f"{self.path} was begun with another {in_words(differing)}; give the same command to continue it, "
                "choose another output, or give --overwrite to start anew"
            )

    def clear(self) -> None:
        """Remove the files of an earlier run or merge, `run.json` last: it marks the folder as a run's."""
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in ("lock", self._run.name):
                entry.unlink()
        self._run.unlink(missing_ok=True)

    @property
    def published(self) -> bool:
        """True if the output exists, has the digest in the report, and was merged from all parts."""
        try:
            listed = json.loads(self.manifest.read_text("utf-8"))["parts"]
            digest = json.loads(self.report.read_text("utf-8"))["output_sha256"]
        except (OSError, ValueError, TypeError, KeyError):
            return False
        made_of_all = listed == [part.listed() for part in self._listed]
        return made_of_all and is_there(self.output) and digest_of(self.output) == digest

    def remove_if_empty(self) -> None:
        """Remove the run folder if it has no part."""
        if not self._listed:
            shutil.rmtree(self.path, ignore_errors=True)

    def commit(self, finished: list[pa.RecordBatch]) -> None:
        """Write these rows (`part_schema`) as the next part.

        Raises `OSError` if the part cannot be written, and `Refused` if another run has written a part of that number.
        """
        table = pa.Table.from_batches(finished)
        rows = table[ROW].to_numpy()
        order = np.argsort(rows)
        assert (np.diff(rows[order]) > 0).all(), "a row is finished twice"
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
        """Write the list of all parts, once all rows are done. Removes the report of an earlier run."""
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
        self,
        schema: pa.Schema,
        batches: Iterable[tuple[int, pa.RecordBatch]],
        num_rows: int,
        results: Sequence[pa.Field] = RESULT_FIELDS,
        rewriting: Rewriting | None = None,
        glance: Glance | None = None,
    ) -> Path:
        """Write the input's kept columns beside the results, in input order. Returns the new file's or folder's path.

        `batches` are (first ordinal, columns of `schema`), in order; what the schema's metadata notes about columns is
        kept. `results` are the job's result columns. With `rewriting`, the output has what that makes of these rows.
        A `glance` sees the result columns.
        Memory holds one batch, and a row group of each part that overlaps it. Raises `Refused` if the input is not the
        one that was run.
        """
        aside = self.temporary / f"merged{self.output.suffix}"
        listed = [(self.parts / part.name, part.first_row) for part in self._listed]
        parts = PartsInOrder(listed, keyless(part_schema(results)))
        merged_schema = with_notes(list(schema), schema.metadata, num_rows, results)
        end = 0
        with OutputWriter(self.output, aside, merged_schema if rewriting is None else rewriting.schema) as writer:
            for first, batch in batches:
                end = first + len(batch)
                if not len(batch):
                    continue
                found = parts.take(first, end)
                if found is None:
                    raise Refused(
                        f"the input changed during the run: rows {first} to {end - 1} do not match the results; run "
                        "the job anew with "
                        "--overwrite"
                    )
                if glance is not None:
                    glance.see(first, found)
                rows = pa.Table.from_arrays([*batch.columns, *found.columns[1:]], schema=merged_schema)
                writer.write(rows if rewriting is None else rewriting.of(first, rows))
            if end != num_rows:
                raise Refused(
                    f"the input changed during the run: it had {num_rows} rows, now it has {end}; run the job anew "
                    "with --overwrite"
                )
        return aside

    def publish(self, aside: Path) -> None:
        """Rename the merged rows to the output, which completes the job."""
        publish(aside, self.output)
