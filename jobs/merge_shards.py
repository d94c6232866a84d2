"""Shards of one job put together: their outputs, one after the other, as if it had been one."""

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
    """Write `output`, whole, from the outputs of all shards, in any order; its rows.

    Raises `Refused` where a shard is missing, there twice, unfinished, damaged, or of another job, and `Interrupted`
    where one is at work.
    """
    written_as = format_of(output)
    refuse_foreign(output)
    if is_there(output) and not overwrite:
        raise Refused(f"output {output} exists; choose another one, or give --overwrite to replace it")
    ordered = _in_order([(path, _fingerprints(path)) for path in shards])
    if others := [path for path in ordered if format_of(path) is not written_as]:
        raise Refused(f"shard {others[0]} has another format than output {output}; name one with the shards' suffix")
    # What a merge has written aside another one takes for a dead one's: a lock that is there already keeps them apart.
    held = lock(RunFolder(ordered[0]).path / "lock")
    if held is None:
        raise Interrupted(f"a run or a merge of {ordered[0]} is at work; nothing was done")
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
            raise Refused(f"{path} is no shard: its run had no --shard")
        return found
    except OSError as error:
        raise Refused(f"{path} is not the output of a run: {file} is not there") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refused(f"{file} is damaged: {error}") from error


def _in_order(shards: list[tuple[Path, dict[str, str]]]) -> list[Path]:
    """By index. Raises `Refused` for holes, overlaps and shards of different jobs."""
    if not shards:
        raise Refused("no shard; give the outputs of all")
    first, expected = shards[0]
    by_index: dict[int, Path] = {}
    count = _numbers(expected)[1]
    for path, found in shards:
        index, of = _numbers(found)
        differing: list[Any] = [name for name in differences(expected, found) if name != "shard"]
        if of != count:
            raise Refused(f"{path} is one of {of} shards, {first} one of {count}")
        if differing:
            raise Refused(f"{path} is of another job than {first}: another {' and '.join(differing)}")
        if index in by_index:
            raise Refused(f"shard {index} of {count} is there twice: {by_index[index]} and {path}")
        by_index[index] = path
    if missing := [str(i) for i in range(count) if i not in by_index]:
        raise Refused(f"of {count} shards {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    return [by_index[i] for i in range(count)]


def _numbers(fingerprints: dict[str, str]) -> tuple[int, int]:
    index, _, count = fingerprints["shard"].partition(" of ")
    return int(index), int(count)
