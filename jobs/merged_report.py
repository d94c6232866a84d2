"""The report of a whole job, made of the reports of its shards."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

from batchinfer.errors import Refused
from batchinfer.jobs.amounts import in_bytes
from batchinfer.jobs.canary import Canary
from batchinfer.jobs.forecast import Forecast
from batchinfer.jobs.report import Report, rates
from batchinfer.jobs.results.glance import FIRST, Answer

SHARD = re.compile(r"--shard([ =])\d+/")  # as a shard's command has it
ADDED = (
    *("rows", "rows_ok", "rows_failed", "rows_resumed", "rows_computed", "rows_duplicate", "rows_reused"),
    *("prompt_tokens", "prompt_tokens_computed", "prompt_tokens_shared", "completion_tokens", "padded_tokens"),
    *("drafted", "accepted", "forced", "steps", "preemptions", "operations", "generate_seconds"),
    *("kv_bytes_read", "kv_bytes_unshared", "unparsed_tool_calls"),
)
ADDED_BY_KEY = ("rows_by_finish_reason", "rows_by_error", "phases", "gpu_steps", "replaced_text")
ADDED_BY_LENGTH = ("step_sizes", "buckets", "completion_lengths")
TOLD_BY_KEY = ("kernels", "versions", "settings")
MEANS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("peak_operations_per_second", "engine_seconds", "measured arithmetic", lambda rate: f"{rate / 1e9:,.0f} GOP/s"),
    ("peak_bytes_per_second", "engine_seconds", "measured memory rate", lambda rate: f"{in_bytes(rate)}/s"),
    ("weight_bytes", "steps", "weights", in_bytes),
    ("experts_touched", "steps", "", str),
)
"""Means over the shards: (name, by what they are weighted, what a note on shards that differ calls it, its format)."""


def merged_report(shards: Sequence[Report], output: Path, digest: str) -> Report:
    """Return the report of `output`, whose sha256 is `digest`, from those of all shards, in the order of their rows.

    Counts and seconds of machines add up. `wall_seconds` is the time from the first shard's start to the last one's
    end, and rates of rows and tokens are over it. What cannot be added is kept where the shards agree; where they
    differ, it says of which shards it is, or a note does. Raises `Refused` if the time of a shard is not known.
    """
    if late := [shard for shard in shards if not shard.ended]:
        raise Refused(f"the report of {late[0].output} does not say when it ended, as those of earlier versions")
    ended = max(shard.ended for shard in shards)
    wall = ended - min(shard.ended - shard.wall_seconds for shard in shards)
    added: dict[str, Any] = {name: sum(getattr(shard, name) for shard in shards) for name in ADDED}
    added |= {name: _sums(getattr(shard, name) for shard in shards) for name in ADDED_BY_KEY}
    for name in ADDED_BY_LENGTH:
        sums = _sums(getattr(shard, name) for shard in shards)
        added[name] = {length: sums[length] for length in sorted(sums, key=int)}
    told: dict[str, Any] = {name: _told_by_key([getattr(shard, name) for shard in shards]) for name in TOLD_BY_KEY}
    devices = {number: shard.device for number, shard in enumerate(shards) if shard.device}
    merged = replace(
        shards[0],
        output=str(output),
        model=_told({number: shard.model for number, shard in enumerate(shards)}),
        device=_told(devices) if devices else "",
        command="\n".join(dict.fromkeys(SHARD.sub(r"--shard\1I/", shard.command) for shard in shards)),
        generation_config={
            group: _told_by_key([shard.generation_config.get(group, {}) for shard in shards])
            for group in shards[0].generation_config
        },
        wall_seconds=wall,
        shards=len(shards),
        shard_seconds=sum(shard.wall_seconds for shard in shards),
        ended=ended,
        output_sha256=digest,
        notes=_notes([shard.notes for shard in shards]),
        first_errors=_first_errors(shards),
        answers=_answers(shards),
        peak_memory_bytes=_largest(shard.peak_memory_bytes for shard in shards),
        kv_cache_bytes=max(shard.kv_cache_bytes for shard in shards),
        **added,
        **told,
    )
    return _with_predictions(_with_means(_with_rates(merged, shards), shards), shards)


def _sums(counts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(int)
    for each in counts:
        for key, count in each.items():
            sums[key] += count
    return dict(sums)


def _largest(sizes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    largest: Counter[str] = Counter()
    for each in sizes:
        largest |= Counter(each)
    return dict(largest)


def _told(values: Mapping[int, Any]) -> Any:
    """Return what all shards have, or else which have which: 'x in shard 0, y in shards 1, 2'."""
    first = next(iter(values.values()))
    if all(value == first for value in values.values()):
        return first
    having: dict[str, list[int]] = {}
    for shard, value in values.items():
        having.setdefault(str(value), []).append(shard)
    return ", ".join(f"{value} in {_named(shards)}" for value, shards in having.items())


def _told_by_key(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    keys = dict.fromkeys(key for each in values for key in each)
    return {key: _told({shard: each[key] for shard, each in enumerate(values) if key in each}) for key in keys}


def _named(shards: Sequence[int]) -> str:
    return f"shard{'' if len(shards) == 1 else 's'} {', '.join(map(str, shards))}"


def _notes(notes: Sequence[Sequence[str]]) -> list[str]:
    """Return each note once; one that only some shards have says which."""
    having: dict[str, list[int]] = {}
    for shard, each in enumerate(notes):
        for note in dict.fromkeys(each):
            having.setdefault(note, []).append(shard)
    return [note if len(shards) == len(notes) else f"{_named(shards)}: {note}" for note, shards in having.items()]


def _starts(shards: Sequence[Report]) -> list[int]:
    """Return the row of the whole table at which each shard begins."""
    return [0, *accumulate(shard.rows for shard in shards[:-1])]


def _first_errors(shards: Sequence[Report]) -> dict[str, list[int]]:
    first: defaultdict[str, list[int]] = defaultdict(list)
    for start, shard in zip(_starts(shards), shards, strict=True):
        for code, rows in shard.first_errors.items():
            first[code] = [*first[code], *(start + row for row in rows)][:FIRST]
    return dict(first)


def _answers(shards: Sequence[Report]) -> list[Answer]:
    """Return as many answers as a shard has at most, at about equal distances."""
    answers = [
        replace(answer, row=start + answer.row)
        for start, shard in zip(_starts(shards), shards, strict=True)
        for answer in shard.answers
    ]
    count = max(len(shard.answers) for shard in shards)
    return [answers[i * len(answers) // count] for i in range(count)]


def _with_rates(merged: Report, shards: Sequence[Report]) -> Report:
    """Set the rates: of rows and tokens over the job's wall time, of prefill and decode over the machines' phases."""
    tokens = {
        kind: sum(shard.tokens_per_second[kind] * shard.phases.get(kind, shard.generate_seconds) for shard in shards)
        for kind in merged.tokens_per_second
    }
    seconds = {kind: merged.phases.get(kind, merged.wall_seconds) for kind in tokens}
    rows = merged.rows_computed / merged.wall_seconds if merged.wall_seconds > 0 else 0.0
    return replace(merged, tokens_per_second=rates(tokens, seconds), rows_per_second=rows)


def _with_means(merged: Report, shards: Sequence[Report]) -> Report:
    """Set the means over the shards that computed: ceilings by the engine's time, sizes by its steps."""
    computing = [shard for shard in shards if shard.steps and shard.engine_seconds > 0]
    means: dict[str, Any] = {}
    notes = [*merged.notes]
    for name, weight, what, shown in MEANS:
        values, weights = [getattr(shard, name) for shard in computing], [getattr(shard, weight) for shard in computing]
        known = bool(values) and all(values)
        means[name] = sum(map(mul, values, weights)) / sum(weights) if known else 0.0
        if what and known and min(values) < max(values):
            notes.append(
                f"{what} of the shards: {shown(min(values))} to {shown(max(values))}; this report has the mean"
            )
    means["weight_bytes"] = round(means["weight_bytes"])
    ideal = merged.engine_seconds * means["peak_operations_per_second"]
    percent = 100 * merged.operations / ideal if ideal > 0 else None
    return replace(merged, **means, percent_of_peak=percent, notes=notes)


def _with_predictions(merged: Report, shards: Sequence[Report]) -> Report:
    """Set the prediction, the sum of the shards', and the canary, the mean over all rows that were compared."""
    notes = [*merged.notes]
    predicted = [shard.predicted for shard in shards if shard.steps]
    known = [each for each in predicted if each is not None]
    if 0 < len(known) < len(predicted):
        notes.append("no time is predicted, because not all shards ran where the device was measured")
    canaries = [shard.canary for shard in shards if shard.canary is not None]
    alike = len({canary.reference for canary in canaries}) == 1
    if canaries and not alike:
        notes.append("the shards' canaries have different references: their own reports have the results")
    return replace(
        merged,
        predicted=_sum_of(known) if known and len(known) == len(predicted) else None,
        canary=_mean_of(canaries) if alike else None,
        notes=notes,
    )


def _sum_of(predicted: Sequence[Forecast]) -> Forecast:
    names = ("seconds", "low", "high", "seconds_for_lengths", "unshared")
    sums = {name: sum(getattr(each, name) for each in predicted) for name in names}
    common = [name for name in predicted[0].others if all(name in each.others for each in predicted)]
    return Forecast(**sums, others={name: sum(each.others[name] for each in predicted) for name in common})


def _mean_of(canaries: Sequence[Canary]) -> Canary:
    rows, tokens = sum(canary.rows for canary in canaries), sum(canary.tokens for canary in canaries)
    return Canary(
        rows=rows,
        reference=canaries[0].reference,
        identical=sum(canary.identical for canary in canaries),
        prefix=sum(canary.prefix * canary.rows for canary in canaries) / max(rows, 1),
        tokens=tokens,
        top1_agreement=sum(canary.top1_agreement * canary.tokens for canary in canaries) / max(tokens, 1),
        divergence=sum(canary.divergence * canary.tokens for canary in canaries) / max(tokens, 1),
        seconds=sum(canary.seconds for canary in canaries),
    )
