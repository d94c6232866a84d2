"""Merging the outputs of all shards of a job into the output that the job would have made without shards."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchinfer.errors import Interrupted, Refused
from batchinfer.jobs.report import read_report
from batchinfer.jobs.results.done import differences
from batchinfer.jobs.results.durable import lock
from batchinfer.jobs.results.formats import OutputFormat, format_of
from batchinfer.jobs.results.output_writer import OutputWriter, files_of, is_there, publish, refuse_foreign, remove_left
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.verify import verify


def merge_shards(shards: Sequence[Path], output: Path, overwrite: bool) -> int:
    """Write `output` from the outputs of all shards, which may be in any order. Returns its number of rows.

    Raises `Refused` if a shard is missing, given twice, unfinished, damaged or of another job, and `Interrupted` if a
    shard or another merge is at work.
    """
    written_as = format_of(output)
    refuse_foreign(output)
    if is_there(output) and not overwrite:
        raise Refused(f"output {output} exists; choose another one, or give --overwrite to replace it")
    ordered = _in_order([(path, _fingerprints(path)) for path in shards])
    if others := [path for path in ordered if format_of(path) is not written_as]:
        raise Refused(
            f"shard {others[0]} has another format than output {output}; name an output with the shards' suffix"
        )
    # A merge removes what a dead merge has left aside. The first shard's lock keeps it from doing so to a living one.
    held = lock(RunFolder(ordered[0]).path / "lock")
    if held is None:
        raise Interrupted(f"a run or a merge of {ordered[0]} is at work; nothing was done: try again when it has ended")
    try:
        return _merge(ordered, output, written_as)
    finally:
        os.close(held)


def _merge(shards: list[Path], output: Path, written_as: OutputFormat) -> int:
    for path in shards:
        verify(path)
    files = [file for path in shards for file in files_of(path)]
    aside = output.with_name(f".{output.name}.merging")
    remove_left(path for path in (aside, aside.with_name(f"{aside.name}-earlier")) if path.exists())
    with OutputWriter(output, aside, written_as.schema(files[0])) as writer:
        for path in files:
            for rows in written_as.slices(path):
                writer.write(rows)
    publish(aside, output)
    return sum(read_report(path).rows for path in shards)  # every shard was verified


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
            raise Refused(f"{path} belongs to another job than {first}: it has another {' and '.join(differing)}")
        if index in by_index:
            raise Refused(f"shard {index} of {count} is given twice, as {by_index[index]} and {path}; leave one out")
        by_index[index] = path
    if missing := [str(i) for i in range(count) if i not in by_index]:
        raise Refused(
            f"of {count} shards, {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; give the "
            "outputs of all"
        )
    return [by_index[i] for i in range(count)]


def _numbers(fingerprints: dict[str, str]) -> tuple[int, int]:
    index, _, count = fingerprints["shard"].partition(" of ")
    return int(index), int(count)
