"""Merging the outputs of all shards of a job into the output that the job would have made without shards.

Beside it lies `OUT.run/` with the report of the whole job, but no parts: these stay with the shards.
"""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchinfer.errors import Interrupted, Refused
from batchinfer.jobs.dataset_card import dataset_card
from batchinfer.jobs.log import say
from batchinfer.jobs.merged_report import merged_report
from batchinfer.jobs.merged_timeline import side_by_side
from batchinfer.jobs.report import Report, read_report
from batchinfer.jobs.report_forms import write_report
from batchinfer.jobs.results.done import differences, in_words
from batchinfer.jobs.results.durable import write_whole
from batchinfer.jobs.results.formats import OutputFormat, format_of
from batchinfer.jobs.results.output_writer import OutputWriter, digest_of, files_of, publish, remove_left
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.timeline import Sample, read_timeline, write_timeline
from batchinfer.jobs.verify import recount


def merge_shards(shards: Sequence[Path], output: Path, overwrite: bool) -> int:
    """Write `output` from the outputs of all shards, which may be in any order. Returns its number of rows.

    Beside it the report of the whole job is written, or one line is printed that says why there is none. With
    `overwrite`, an earlier output and its run folder are replaced. Raises `Refused` if a shard is missing, given twice,
    unfinished, damaged or of another job, and `Interrupted` if a shard or another merge is at work.
    """
    written_as = format_of(output)
    folder = RunFolder(output)
    folder.refuse_foreign()
    if folder.unfinished:
        raise Refused(f"{folder.path} holds rows of a run that is not complete; choose another output, or move it away")
    if folder.begun and not overwrite:
        raise Refused(f"output {output} exists; choose another one, or give --overwrite to replace it")
    ordered = _in_order([(path, _fingerprints(path)) for path in shards])
    if others := [path for path in ordered if format_of(path) is not written_as]:
        raise Refused(
            f"shard {others[0]} has another format than output {output}; name an output with the shards' suffix"
        )
    if busy := [path for path in ordered if RunFolder(path).taken]:
        raise Interrupted(f"a run of {busy[0]} is at work; nothing was done: try again when it has ended")
    with closing(folder), folder.taken_before_open():  # a merge removes what a dead one has left aside, and no other
        return _merge(ordered, folder, written_as)


def _merge(shards: list[Path], folder: RunFolder, written_as: OutputFormat) -> int:
    output = folder.output
    reports = [_report_of(path) for path in shards]
    counted = [recount(path, isinstance(report, Report))[0] for path, report in zip(shards, reports, strict=True)]
    files = [file for path in shards for file in files_of(path)]
    aside = output.with_name(f".{output.name}.merging")
    remove_left(path for path in (aside, aside.with_name(f"{aside.name}-earlier")) if path.exists())
    with OutputWriter(output, aside, written_as.schema(files[0])) as writer:
        for path in files:
            for rows in written_as.slices(path):
                writer.write(rows)
    folder.clear()
    try:
        _write_reports(shards, [_known(report) for report in reports], folder, digest_of(aside))
    except Refused as error:
        say(f"the rows of {output} are whole, but no report of them is written: {error}", level="warning")
        folder.remove_if_empty()
    publish(aside, output)
    return sum(totals.rows for totals in counted)


def _report_of(shard: Path) -> Report | Refused:
    """Return the report of a shard, or why it cannot be read: its rows can be counted without."""
    try:
        return read_report(shard)
    except Refused as error:
        return error


def _known(report: Report | Refused) -> Report:
    if isinstance(report, Refused):
        raise report
    return report


def _write_reports(shards: Sequence[Path], reports: Sequence[Report], folder: RunFolder, digest: str) -> None:
    """Write the report of the whole job, its timeline, and the card of a folder. Raises `Refused` if that cannot be."""
    timelines: list[list[Sample]] = []
    notes: list[str] = []
    for path in shards:
        try:
            timelines.append(read_timeline(RunFolder(path).timeline))
        except Refused as error:
            notes.append(f"{error}; the figures over time are without {path.name}")
    try:
        merged = merged_report(reports, folder.output, digest)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refused(f"the report of a shard is damaged ({type(error).__name__})") from error
    merged = replace(merged, notes=[*merged.notes, *notes])
    samples = side_by_side(timelines)
    write_report(folder, merged, samples)
    write_timeline(folder.timeline, samples)
    if RunFolder(shards[0]).card.exists():
        run = json.loads((RunFolder(shards[0]).path / "run.json").read_text("utf-8"))
        write_whole(folder.card, dataset_card(run["spec"], merged, Path(run["engine"]["model"])).encode())


def _fingerprints(path: Path) -> dict[str, str]:
    file = RunFolder(path).path / "run.json"
    try:
        found: dict[str, str] = json.loads(file.read_text("utf-8"))["fingerprints"]
        if not found.get("shard"):
            raise Refused(f"{path} is not a shard: its run had no --shard; give the outputs of shards only")
        return found
    except OSError as error:
        raise Refused(
            f"{path} is not the output of a run: {file} does not exist; give the outputs of shards only"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refused(f"{file} is damaged: {error}; run that shard anew with --overwrite") from error


def _in_order(shards: list[tuple[Path, dict[str, str]]]) -> list[Path]:
    """Sort the shards by index. Raises `Refused` if one is missing, given twice, or of another job."""
    if not shards:
        raise Refused("no shards; give the outputs of all shards")
    first, expected = shards[0]
    by_index: dict[int, Path] = {}
    count = _numbers(expected)[1]
    for path, found in shards:
        index, of = _numbers(found)
        differing: list[Any] = [name for name in differences(expected, found) if name != "shard"]
        if of != count:
            raise Refused(f"{path} is one of {of} shards, {first} one of {count}; give the shards of one job")
        if differing:
            raise Refused(f"{path} belongs to another job than {first}: it has another {in_words(differing)}")
        if index in by_index:
            raise Refused(f"shard {index} of {count} is given twice, as {by_index[index]} and {path}; leave one out")
        by_index[index] = path
    if missing := [str(i) for i in range(count) if i not in by_index]:
        which = f"shard {missing[0]}" if len(missing) == 1 else f"shards {', '.join(missing)}"
        raise Refused(f"without {which} of {count}, counted from 0, there is no whole table; give the outputs of all")
    return [by_index[i] for i in range(count)]


def _numbers(fingerprints: dict[str, str]) -> tuple[int, int]:
    index, _, count = fingerprints["shard"].partition(" of ")
    return int(index), int(count)
