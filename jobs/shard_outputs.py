"""Finding the outputs of a job's shards, also of those that have not begun, from the names that a user gives."""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from batchinfer.errors import Refused
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.spec import sharded

SHARD = re.compile(r"(.+)-\d+-of-(\d+)")  # a shard's output without its suffix, and its run folder


def outputs_of(given: Sequence[Path], submitted: Callable[[Path], int | None] = lambda output: None) -> list[Path]:
    """Return the outputs that are meant: the one that was given, if there is a run of it, or those of shards.

    The name of a job stands for its shards, if it has no run folder itself; a pattern with '*' for the outputs that it
    fits, since no shell finds one that is not complete; and several outputs for all shards of their jobs. `submitted`
    tells how many shards were submitted for an output. Raises `Refused` if a pattern fits nothing, or a name stands for
    shards of several jobs.
    """
    if len(given) == 1 and "*" not in given[0].name:
        return [*given] if RunFolder(given[0]).path.exists() else _shards_of(given[0], submitted) or [*given]
    found = [output for each in given for output in (_matching(each) if "*" in each.name else [each])]
    return list(dict.fromkeys(shard for output in found for shard in _siblings(output)))


def _shards_of(output: Path, submitted: Callable[[Path], int | None]) -> list[Path]:
    count = submitted(output)
    found = (SHARD.fullmatch(folder.stem) for folder in output.absolute().parent.glob("*-of-*.run"))
    counts = (
        {int(name[2]) for name in found if name is not None and name[1] == output.stem} if count is None else {count}
    )
    if len(counts) > 1:
        told = " and ".join(f"of {count}" for count in sorted(counts))
        pattern = output.with_name(f"{output.stem}-*-of-{max(counts)}{output.suffix}")
        raise Refused(f"{output} has shards {told}; give those of one job, as '{pattern}'")
    return [sharded(output, shard, count) for count in counts for shard in range(count)]


def _matching(pattern: Path) -> list[Path]:
    folders = (folder.name.removesuffix(".run") for folder in pattern.absolute().parent.glob("*.run"))
    names = sorted(f"{stem}{pattern.suffix}" for stem in folders)
    found = [pattern.with_name(name) for name in names if fnmatchcase(name, pattern.name)]
    if not found:
        raise Refused(f"no job has begun at {pattern}; give the output of a job as its -o")
    return found


def _siblings(output: Path) -> list[Path]:
    """Return the outputs of all shards of this one's job; the output itself if it is no shard."""
    name = SHARD.fullmatch(output.stem)
    if name is None or not RunFolder(output).path.exists():
        return [output]
    job = output.with_name(f"{name[1]}{output.suffix}")
    return [sharded(job, shard, int(name[2])) for shard in range(int(name[2]))]
