"""The report of a job as a web page, `OUT.run/report.html`."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path

from batchinfer.jobs.advice import advice, at_ceilings
from batchinfer.jobs.amounts import count_of, in_bytes, in_seconds
from batchinfer.jobs.charts import FIRST, SECOND, bars_beside_names, bars_over_lengths, lines_over_time, roofline
from batchinfer.jobs.report import Report
from batchinfer.jobs.timeline import Sample
from batchinfer.jobs.web_page import (
    facts,
    figure,
    figures,
    heading,
    page,
    paragraph,
    points,
    preformatted,
    section,
    table,
    tiles,
)

PROCESSES = {"parent": "the job's process", "engine": "the engine's process", "gpu": "on the GPU"}
PLOTTED = 120  # samples of a curve: more are not told apart in a chart of this size


def report_page(report: Report, samples: Sequence[Sample]) -> str:
    """Return the page; `samples` are those of the job's timeline, in the order of time."""
    name = Path(report.output).name
    return page(
        f"{name}: report",
        (
            heading(name),
            paragraph(_lead(report), "lead"),
            tiles(_tiles(report)),
            section("What limited this job", points(advice(report))),
            section("Over time", figures(_over_time(samples))),
            section("Where the time went", figures([*_phases(report), *_roofline(report)]), _prediction(report)),
            section("Rows", _outcomes(report), _answers(report)),
            section("Tokens", figures([*_lengths(report)]), facts(_saved(report))),
            section("Quality", facts(report.canary.lines() if report.canary is not None else [])),
            section("Memory", facts(_memory(report))),
            section("Notes", points(report.notes)),
            section("What ran", facts(_what_ran(report)), preformatted(report.command)),
        ),
    )


def _lead(report: Report) -> str:
    ended = f"completed {datetime.fromtimestamp(report.ended, UTC):%Y-%m-%d %H:%M} UTC" if report.ended else ""
    return ", ".join(filter(None, [report.model, report.device or "no model was loaded", ended]))


def _tiles(report: Report) -> list[tuple[str, str]]:
    counts = [
        (f"{report.rows_ok:,}", f"of {report.rows:,} rows have an answer"),
        (f"{report.rows_failed:,}", "rows failed"),
        (in_seconds(report.wall_seconds), _of_it(report)),
    ]
    if not report.generate_seconds:
        return counts
    return [
        *counts,
        (f"{report.rows_per_second:,.2f}", f"rows a second{'' if report.shards else ' of generating'}"),
        (f"{report.tokens_per_second['total']:,.0f}", "tokens a second, in and out"),
        (f"{report.completion_tokens:,}", f"tokens generated, {report.prompt_tokens:,} in prompts"),
    ]


def _of_it(report: Report) -> str:
    generating = f", {in_seconds(report.generate_seconds)} of it generating" if report.generate_seconds else ""
    if not report.shards:
        return f"in {'this run' if report.rows_resumed else 'all'}{generating}"
    return f"for {report.shards:,} shards, which took {in_seconds(report.shard_seconds)} together{generating}"


def _over_time(samples: Sequence[Sample]) -> list[str]:
    if len(samples) < 2:
        return []
    shown = thinned(samples, PLOTTED)
    seconds = list(accumulate(sample.seconds for sample in shown))
    spans = [max(sample.seconds, 1e-9) for sample in shown]
    prompts = [sample.prompt_tokens / span for sample, span in zip(shown, spans, strict=True)]
    answers = [sample.completion_tokens / span for sample, span in zip(shown, spans, strict=True)]
    curves = [("prompts", SECOND, prompts), ("answers", FIRST, answers)]
    rates = lines_over_time("Tokens a second over time", seconds, curves)
    rows = [("rows", FIRST, [sample.rows / span for sample, span in zip(shown, spans, strict=True)])]
    running = [("running", FIRST, [sample.running for sample in shown])]
    cache = [("KV cache", FIRST, [100 * sample.kv_cache_used for sample in shown])]
    return [
        figure("Tokens a second", rates, "computed, over the time of generating"),
        figure("Rows a second", lines_over_time("Rows that ended a second", seconds, rows), "that ended"),
        figure("Rows side by side", lines_over_time("Rows side by side", seconds, running), "that the engine works on"),
        figure(
            "KV cache in use",
            lines_over_time("Share of the KV cache in use", seconds, cache, " %"),
            "of the room for keys and values",
        ),
    ]


def thinned(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Join neighbours until at most `most` samples are left, each of about as many."""
    each = -(-len(samples) // most)
    groups = [samples[i : i + each] for i in range(0, len(samples), each)]
    return [list(accumulate(group))[-1] for group in groups]


def _phases(report: Report) -> list[str]:
    phases = {name: (seconds,) for name, seconds in report.phases.items() if seconds}
    if not phases:
        return []
    chart = bars_beside_names("Seconds of each phase", phases, in_seconds)
    return [figure("Phases", chart, "they overlap: the job tokenizes and commits while the engine computes")]


def _roofline(report: Report) -> list[str]:
    seconds, nbytes = report.engine_seconds, report.bytes_read
    ceilings = report.peak_operations_per_second, report.peak_bytes_per_second
    if not (seconds > 0 and nbytes and report.operations and all(ceilings)):
        return []
    operations, of_memory = at_ceilings(report)
    chart = roofline("Roofline", *ceilings, report.operations / nbytes, report.operations / seconds)
    said = (
        f"operations a second: {100 * operations:.0f} % of the arithmetic, {100 * of_memory:.0f} % of the memory rate"
    )
    return [figure("Against the device's ceilings", chart, said)]


def _prediction(report: Report) -> str:
    predicted = report.predicted
    if not report.device:
        return ""
    if predicted is None:
        return paragraph(
            "No time was predicted, because this device was not measured: batchinfer doctor --calibrate measures it."
        )
    return facts(
        [
            *predicted.lines(),
            ("took", f"{in_seconds(report.generate_seconds)} of generating"),
            *((f"  with {name}", f"{in_seconds(seconds)} predicted") for name, seconds in predicted.others.items()),
        ]
    )


def _outcomes(report: Report) -> str:
    reasons = [
        (reason, "", f"{count:,}") for reason, count in report.rows_by_finish_reason.items() if reason != "error"
    ]
    errors = [
        (f"error: {code}", _first_rows(report.first_errors.get(code, []), count), f"{count:,}")
        for code, count in report.rows_by_error.items()
    ]
    before = [
        (name, said, f"{count:,}")
        for name, said, count in (
            ("done before", "by earlier runs of this job", report.rows_resumed),
            ("reused", "answered by earlier jobs", report.rows_reused),
            ("duplicates", "got the answer of an equal row", report.rows_duplicate),
        )
        if count
    ]
    shown = [row for row in [*reasons, *errors] if row[2] != "0"]
    outcomes = table(("ended by", "first of them, counted from 0" if errors else "", "rows"), shown, 1)
    return outcomes + table(("of them", "", "rows"), before, 1)


def _first_rows(rows: Sequence[int], count: int) -> str:
    if not rows:
        return ""
    more = " and more" if count > len(rows) else ""
    return f"row{'' if count == 1 else 's'} {', '.join(map(str, rows))}{more}"


def _answers(report: Report) -> str:
    rows = [(f"{answer.row:,}", (answer.text or "").strip("\n"), answer.ended) for answer in report.answers]
    return table(("row", "answer", "ended by"), rows)


def _lengths(report: Report) -> Iterator[str]:
    for title, counts, counted in (
        ("Prompt lengths", report.buckets, "rows computed"),
        ("Answer lengths", report.completion_lengths, "answers computed"),
    ):
        if counts:
            yield figure(title, bars_over_lengths(title, counts), f"number of {counted}")


def _saved(report: Report) -> Iterator[tuple[str, str]]:
    """Yield what was not computed, with the seconds that it would have taken where the device was measured."""
    computed = report.prompt_tokens_computed
    if report.prompt_tokens:
        these = "all" if computed == report.prompt_tokens else f"of which {computed:,}"
        yield "prompt tokens", f"{report.prompt_tokens:,}, {these} computed in this run"
    predicted = report.predicted
    known = predicted.seconds_for_lengths if predicted is not None else 0.0
    if report.prompt_tokens_shared:
        seconds = max(0.0, predicted.unshared - known) if predicted is not None and predicted.unshared else 0.0
        yield "shared", f"{report.prompt_tokens_shared:,} were computed for another row{_worth(seconds)}"
    if report.rows_duplicate:
        each = known / max(report.rows_computed - report.rows_duplicate, 1)
        yield "duplicates", f"{count_of(report.rows_duplicate, 'row')}{_worth(each * report.rows_duplicate)}"
    if report.drafted:
        share = 100 * report.accepted / report.drafted
        seconds = max(0.0, known - report.generate_seconds)
        yield "drafts", f"{report.drafted:,}, of which {report.accepted:,} accepted ({share:.1f} %){_worth(seconds)}"
    if report.forced:
        yield "forced", f"{count_of(report.forced, 'token')} that grammars left no choice for, taken without the model"
    if report.padded_tokens:
        whole = computed + report.completion_tokens + report.padded_tokens
        yield (
            "padding",
            f"{count_of(report.padded_tokens, 'token')}, {100 * report.padded_tokens / whole:.1f} % of those computed",
        )
    if report.preemptions:
        yield "preemptions", f"{count_of(report.preemptions, 'time')} a row was computed again"


def _worth(seconds: float) -> str:
    return f"; that saved about {in_seconds(seconds)}, as predicted" if seconds > 0 else ""


def _memory(report: Report) -> Iterator[tuple[str, str]]:
    for process, size in report.peak_memory_bytes.items():
        if size:
            yield PROCESSES[process], f"{in_bytes(size)} at its peak"
    if report.device:
        yield "weights", in_bytes(report.weight_bytes)
        yield "keys and values", in_bytes(report.kv_cache_bytes)


def _what_ran(report: Report) -> Iterator[tuple[str, str]]:
    yield "output", report.output
    yield "model", report.model
    yield "device", report.device or "none, since no model was loaded"
    yield "kernels", "; ".join(f"{operation}: {path}" for operation, path in report.kernels.items())
    yield "versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())
    names = ("quantization", "dtype", "kv_cache_dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
    yield "settings", ", ".join(f"{name} {report.settings[name]}" for name in names if name in report.settings)
    yield "sha256 of the output", report.output_sha256
