"""Incremental jobs: each run answers the rows that are new since the last run, and adds a file to the output folder.

`OUT/` has one file for each run, part-N.parquet. `OUT.run/part-N.rows.parquet` holds the new rows of that run. They are
set aside before it begins, so that it can continue with them even if the input changes. `OUT.run/part-N.run/` is the
run folder of that file.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from batchinfer.errors import Interrupted, Refused, UsageError
from batchinfer.jobs.log import say
from batchinfer.jobs.metrics import Metrics
from batchinfer.jobs.preflight import Preflight, preflight
from batchinfer.jobs.report import Report, read_report
from batchinfer.jobs.results.done import differences, in_words
from batchinfer.jobs.results.durable import lock, sync_folder, write_json
from batchinfer.jobs.results.output_writer import OutputWriter, refuse_foreign
from batchinfer.jobs.results.run_folder import RunFolder, incremental_files, rows_of, run_folder
from batchinfer.jobs.results.schema_notes import with_notes
from batchinfer.jobs.run_state import RunState
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.ids import as_text, check_ids
from batchinfer.jobs.tables.json_lines import indices_not_text, only
from batchinfer.jobs.tables.table import Table

BATCH_ROWS = 8192
KEY_BYTES = 16

Keys = NDArray[np.bytes_]  # [n] of KEY_BYTES each


def run_new_rows(spec: JobSpec, run: Callable[[JobSpec], Report]) -> Report:
    """Finish an interrupted run, then run the rows whose id and content are new. Returns the report of the last run.

    With `retry_errors`, rows that failed in earlier runs run again, and their files are replaced. Raises what `run`
    raises, and `Refused` if more than the rows differs from earlier runs.
    """
    if not spec.adds_file:
        raise UsageError(
            f"--incremental adds one file in each run, so --output {spec.output} must be a folder; give a name "
            "without suffix"
        )
    until = None if spec.time_limit is None else time.monotonic() + spec.time_limit
    folder = run_folder(spec.output)
    with _alone(folder):
        with _told(spec):
            refuse_foreign(spec.output)
            job = preflight(spec)
            _refuse_another_job(spec.output, job)
            spec.output.mkdir(exist_ok=True)
        report = None
        for part in incremental_files(spec.output):
            if not part.exists() or (spec.retry_errors and read_report(part).rows_failed):
                report = run(_run_of(spec, job, part, until))
        part = spec.output / f"part-{len(incremental_files(spec.output)) + 1:06d}.parquet"
        with _told(spec):
            begun = _set_aside_new_rows(job, spec, rows_of(part))
        if begun:
            return run(_run_of(spec, job, part, until))
        if report is None:
            last = incremental_files(spec.output)[-1]
            say(f"no new rows since {last}")
            report = run(_run_of(spec, job, last, until))  # complete already; reports and metrics show it as a run
        return report


@contextmanager
def _told(spec: JobSpec) -> Iterator[None]:
    """Write to the metrics file if an error ends the job before a run has begun."""
    state = RunState()
    try:
        yield
    except BaseException as error:
        state.end(error)
        Metrics(spec, RunFolder(spec.output), state).write()
        raise


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    if (folder / "run.json").exists():
        raise Refused(
            f"{folder} was begun without --incremental; leave that flag out to continue it, or give another output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = lock(folder / "lock")
    if descriptor is None:
        raise Interrupted(f"another run is at work in {folder}; nothing was done: try again when it has ended")
    try:
        yield
    finally:
        os.close(descriptor)


def _run_of(spec: JobSpec, job: Preflight, part: Path, until: float | None) -> JobSpec:
    left = None if until is None else max(0.001, until - time.monotonic())
    return replace(
        spec,
        inputs=(rows_of(part),),
        csv_delimiter=None,
        csv_encoding=None,
        where=None,
        limit=None,
        output=part,
        prompt_template=job.spec.prompt_template,  # all runs have its fields in one order
        columns=tuple(job.kept),
        time_limit=left,
    )


def _refuse_another_job(output: Path, job: Preflight) -> None:
    folder = run_folder(output)
    file = RunFolder(output).growth
    types = {name: str(job.table.schema.field(name).type) for name in _columns(job)}
    now = {"fingerprints": job.fingerprints, "types": types}
    if not incremental_files(output):
        write_json(file, {**now, "prompt_template": job.spec.prompt_template})
        return
    try:
        before = json.loads(file.read_text("utf-8"))
        differing = differences(before["fingerprints"], now["fingerprints"])
        drifted = [name for name in types if before["types"].get(name) != types[name]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refused(f"{file} is damaged; give another output to start anew") from error
    if differing:
        raise Refused(
            f"{folder} was begun with another {in_words(differing)}; give the same command to continue it, or "
            "another output"
        )
    if drifted:
        name = drifted[0]
        raise Refused(
            f"column {name!r} is {types[name]}; in earlier runs it was {before['types'].get(name, 'not kept')}; give "
            "it that "
            "type again, or give another output"
        )


def _columns(job: Preflight) -> list[str]:
    return list(dict.fromkeys([*job.kept, *job.source.columns]))


def _set_aside_new_rows(job: Preflight, spec: JobSpec, target: Path) -> bool:
    """Write the new rows to `target`. Returns False if there are none, unless this is the first run."""
    seen = _seen(job, spec)
    schema = with_notes([job.table.schema.field(name) for name in _columns(job)], job.table.schema.metadata)
    aside = target.with_name("aside.parquet")
    aside.unlink(missing_ok=True)
    count = 0
    with OutputWriter(target, aside, schema) as writer:
        for _, batch in job.table.batches(_columns(job), BATCH_ROWS):
            batch = _as_stored(batch, spec.prompt_column)
            new = ~_among(row_keys(batch, job.source.columns), seen)
            writer.write(pa.Table.from_batches([pa.record_batch(only(batch, new).columns, schema)], schema))
            count += int(new.sum())
    if not count and incremental_files(spec.output):
        aside.unlink()
        return False
    check_ids(Table.open([aside]), str(spec.id_column))  # rows may have been added since the input was checked
    aside.rename(target)
    sync_folder(target.parent)
    return True


def _seen(job: Preflight, spec: JobSpec) -> Keys:
    keys = [np.empty(0, f"S{KEY_BYTES}")]
    for part in incremental_files(spec.output):
        rows = Table.open([rows_of(part)])
        keys += [row_keys(batch, job.source.columns) for _, batch in rows.batches(job.source.columns, BATCH_ROWS)]
    return np.sort(np.concatenate(keys))


def _among(keys: Keys, known: Keys) -> NDArray[np.bool_]:
    """Return which of the keys [n] are in `known`, which is sorted."""
    if not len(known):
        return np.zeros(len(keys), np.bool_)
    indices = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.asarray(known[indices] == keys)


def row_keys(batch: pa.RecordBatch, columns: list[str]) -> Keys:
    """Return a digest of each row's values in these columns [rows]. It does not depend on which text type is used."""
    digests = [hashlib.blake2b(digest_size=KEY_BYTES) for _ in range(len(batch))]
    for name in columns:
        for digest, value in zip(digests, _values(batch.column(name)), strict=True):
            digest.update(b"-" if value is None else b"%d:" % len(value))
            digest.update(value or b"")
    return np.array([digest.digest() for digest in digests], f"S{KEY_BYTES}")


def _values(column: pa.Array) -> list[bytes | None]:
    if pa.types.is_nested(column.type):
        return [None if not value.is_valid else _json(value) for value in column]
    values: list[bytes | None] = as_text(column).cast(pa.large_binary()).to_pylist()
    return values


def _json(value: pa.Scalar) -> bytes:
    try:
        return json.dumps(value.as_py(), sort_keys=True, default=str).encode()
    except UnicodeDecodeError:
        return b"no UTF-8"  # its row fails, whatever the other bytes are


def _as_stored(batch: pa.RecordBatch, prompt_column: str | None) -> pa.RecordBatch:
    """Set prompts that were not text in JSON to null, since Parquet cannot mark them. Their rows fail in both cases.
    Elsewhere such values are prompts too, as their JSON."""
    arrays = batch.columns
    if prompt_column is not None and (indices := indices_not_text(batch, prompt_column)):
        wrong = np.isin(np.arange(len(batch)), indices)
        place = batch.schema.get_field_index(prompt_column)
        arrays[place] = pc.if_else(pa.array(wrong), pa.scalar(None, arrays[place].type), arrays[place])
    return pa.record_batch(arrays, batch.schema.remove_metadata())
