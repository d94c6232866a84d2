"""Checking that an output is what its run computed: hashes, rows and tokens are counted again from the files."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.errors import Refused
from batchinfer.host.files import sha256
from batchinfer.jobs.amounts import count_of
from batchinfer.jobs.fingerprints import OPENAI_BATCH
from batchinfer.jobs.openai_batch.responses import counted
from batchinfer.jobs.report import Report, read_report
from batchinfer.jobs.results.done import Part, completion_tokens, counts, read_part
from batchinfer.jobs.results.formats import format_of
from batchinfer.jobs.results.output_writer import digest_of, files_of, is_there
from batchinfer.jobs.results.run_folder import RunFolder, incremental_files
from batchinfer.jobs.results.schema import ROW


@dataclass
class Totals:
    """Counts over rows."""

    reasons: Counter[str]
    errors: Counter[str]
    rows: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def empty(cls) -> "Totals":
        return cls(Counter(), Counter())

    @classmethod
    def of(cls, report: Report) -> "Totals":
        """Return what a report says."""
        return cls(
            Counter(report.rows_by_finish_reason),
            Counter(report.rows_by_error),
            report.rows,
            report.prompt_tokens,
            report.completion_tokens,
        )

    def add(self, table: pa.Table) -> None:
        """Count a table's rows."""
        self.rows += len(table)
        self.reasons.update(counts(table["finish_reason"]))
        self.errors.update(counts(table["error_code"]))
        self.prompt_tokens += pc.sum(table["prompt_tokens"]).as_py() or 0
        self.completion_tokens += completion_tokens(table)

    def text(self) -> str:
        """Return the counts on one line."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.reasons.items()) if count)
        return (
            f"{count_of(self.rows, 'row')} ({reasons or 'none'}), {count_of(self.prompt_tokens, 'prompt token')}, "
            f"{count_of(self.completion_tokens, 'completion token')}"
        )


def verify(output: Path) -> list[str]:
    """Check an output. Returns lines with the counts; an incremental output is checked and described file by file. Of
    merged shards, which `merge` has verified, the hash alone is compared.

    Raises `Refused` with the first difference that is found.
    """
    if files := incremental_files(output):
        if others := set(files_of(output)) - set(files):
            raise Refused(f"{min(others)} was written by no run; move it away")
        return [line for file in files for line in verify(file)]
    folder = RunFolder(output)
    if folder.report.exists() and not folder.manifest.exists() and (report := read_report(output)).shards:
        _check_digest(output, report, folder)
        shards = count_of(report.shards, "shard")
        return [f"{output}: {Totals.of(report).text()}", f"merged of {shards}, each verified then; its hash is right"]
    totals, parts = recount(output)
    return [f"{output}: {totals.text()}", f"{count_of(parts, 'part')}, report and output agree; all hashes are right"]


def recount(output: Path, has_report: bool = True) -> tuple[Totals, int]:
    """Check an output that is no incremental one. Returns its counts, and its number of parts.

    Without a report, which has the output's sha256, the output's counts are all that is compared with the parts. Raises
    `Refused` with the first difference that is found.
    """
    folder = RunFolder(output)
    manifest = _manifest(folder)
    in_parts = _verify_parts(folder, manifest)
    report = read_report(output) if has_report else None
    if not is_there(output):
        raise Refused(
            f"{output} does not exist, though {folder.manifest} says that all rows are done; run the job again"
        )
    if report is not None:
        _check_digest(output, report, folder)
    found_in = {output: _count_output(output, manifest["fingerprints"].get("format") == OPENAI_BATCH)}
    if report is not None:
        found_in[folder.report] = Totals.of(report)
    for name, found in found_in.items():
        if found != in_parts:
            raise Refused(
                f"{name} counts {found.text()}, but the parts hold {in_parts.text()}; run the job anew with --overwrite"
            )
    return in_parts, len(manifest["parts"])


def _check_digest(output: Path, report: Report, folder: RunFolder) -> None:
    if digest_of(output) != report.output_sha256:
        another = "" if Path(report.output).name == output.name else f", which is about {report.output}"
        again = "merge the shards" if report.shards else "run the job"
        raise Refused(f"{output} was changed: its sha256 is not the one in {folder.report}{another}; {again} again")


def _manifest(folder: RunFolder) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(folder.manifest.read_text("utf-8"))
        if not isinstance(manifest["rows"], int):
            raise ValueError("rows is not a whole number")
        manifest["parts"] = [Part(**part) for part in manifest["parts"]]
        return manifest
    except FileNotFoundError as error:
        folder.refuse_unbegun()
        raise Refused(
            f"{folder.manifest} does not exist: the job is not complete; give its command again; of shards that were "
            "merged without a report, verify each"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise Refused(f"{folder.manifest} is damaged: {error}; run the job anew with --overwrite") from error


def _verify_parts(folder: RunFolder, manifest: dict[str, Any]) -> Totals:
    """Check the parts against the manifest. Returns the counts of all rows; a row's last result counts."""
    names = {part.name for part in manifest["parts"]}
    if more := sorted(path.name for path in folder.parts.iterdir() if path.name not in names):
        raise Refused(
            f"{folder.parts / more[0]} is not in the manifest: the job is not complete; give its command again"
        )
    totals, seen = Totals.empty(), np.zeros(manifest["rows"], np.bool_)
    for part in reversed(manifest["parts"]):
        path = folder.parts / part.name
        try:
            table, _ = read_part(path)
            found = Part.of(part.name, table, path.stat().st_size, sha256(path))
        except OSError as error:
            raise Refused(str(error)) from error
        if found != part:
            differing = next(name for name in vars(part) if getattr(found, name) != getattr(part, name))
            raise Refused(
                f"part {path} differs from the manifest: {differing} is {getattr(found, differing)}, not "
                f"{getattr(part, differing)}; remove the part and run the job again"
            )
        totals.add(_fresh(table, seen, path))
    if missing := np.flatnonzero(~seen)[:1].tolist():
        raise Refused(f"row {missing[0]} is in no part; run the job again")
    return totals


def _fresh(table: pa.Table, seen: np.ndarray[Any, np.dtype[np.bool_]], path: Path) -> pa.Table:
    """Return the rows of a part that no later part has, and mark them in `seen`.

    Raises `Refused` for an impossible row, and for a row that is in a later part though it had not failed in this one.
    """
    rows = table[ROW].to_numpy()
    if len(np.unique(rows)) < len(rows) or rows.min() < 0 or rows.max() >= len(seen):
        raise Refused(
            f"part {path} has a row twice, or a row that is not in the input; run the job anew with --overwrite"
        )
    again = seen[rows]
    failed = pc.equal(table["finish_reason"], "error").to_numpy()
    if (again & ~failed).any():
        raise Refused(
            f"row {rows[again & ~failed][0]} of part {path} is in a later part too, though it had not failed; run the "
            "job anew with --overwrite"
        )
    seen[rows] = True
    return table.filter(pa.array(~again))


def _count_output(output: Path, openai_batch: bool) -> Totals:
    totals = Totals.empty()
    for path in files_of(output):
        for table in counted(path) if openai_batch else format_of(path).results(path):
            totals.add(table)
    return totals
