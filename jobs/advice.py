"""Saying in plain sentences what limited a job and which flag would have helped, from the figures of its report."""

from collections.abc import Callable, Iterator

from batchinfer.jobs.amounts import count_of, in_seconds
from batchinfer.jobs.report import Report
from batchinfer.jobs.row_errors import ROW_ERRORS
from batchinfer.kernels.cpu_library import REFERENCE

LOADING = 0.4  # share of the wall time above which loading is said to limit a job
GENERATING = 0.5  # share of the wall time below which starting is said to limit a job
WAITING = 0.8  # tokenizing as a share of generating, from which on the engine is likely to have waited for prompts
AT_A_CEILING = 0.5  # share of a ceiling above which it is said to limit a job
CUT = 0.05  # share of the answers that end at their length, from which on it is worth a sentence
PADDED = 0.1  # share of the tokens computed that are padding, likewise
PREEMPTED = 0.02  # preemptions a row, likewise
FASTER = 0.9  # predicted time with other products, as a share, below which these are named
MERGING = 0.2  # share of the wall time


def advice(report: Report) -> list[str]:
    """Return sentences, the most important first; none if nothing stands out."""
    found = (rule(report) for rule in RULES)
    return [sentence for sentences in found for sentence in sentences]


def _failures(report: Report) -> Iterator[str]:
    for code, count in report.rows_by_error.items():
        if (kind := ROW_ERRORS.get(code)) is not None:
            yield f"{count_of(count, 'row')} failed with {code}, because {kind.meaning}: {kind.remedy}."


def _cut(report: Report) -> Iterator[str]:
    cut = report.rows_by_finish_reason.get("length", 0)
    if report.rows_ok and cut >= CUT * report.rows_ok:
        yield (
            f"{count_of(cut, 'row')} ({_percent(cut / report.rows_ok)} of those with an answer) ended at --max-tokens "
            "or --max-model-len and may be cut short: raise it if answers should be whole."
        )


def _limit(report: Report) -> Iterator[str]:
    """Say what took the time: loading, tokenizing, or a ceiling of the device."""
    if not report.steps:
        return
    load, generating = report.phases["load"], report.generate_seconds
    if load > LOADING * report.machine_seconds:
        yield (
            f"Loading the model took {in_seconds(load)}, {_percent(load / report.machine_seconds)} of {_time(report)}: "
            "one job over more rows, or over several inputs, loads it once."
        )
    elif report.canary is None and generating < GENERATING * report.machine_seconds:
        yield (
            f"Generating took only {in_seconds(generating)}, {_percent(generating / report.machine_seconds)} of "
            f"{_time(report)}: one job over more rows, or over several inputs, starts once for all of them."
        )
        return
    elif report.phases["tokenize"] > WAITING * report.generate_seconds:
        yield (
            f"Tokenizing took {in_seconds(report.phases['tokenize'])} beside {in_seconds(report.generate_seconds)} of "
            "generating, so the engine may have waited for prompts: shorter prompts, or several shards side by side "
            "with --shard, would help."
        )
    operations, nbytes = at_ceilings(report)
    if operations >= AT_A_CEILING:
        yield (
            f"The arithmetic of the device limited this job: matrix products ran at {_percent(operations)} of what it "
            "reached in a test."
        )
    elif nbytes >= AT_A_CEILING:
        yield (
            f"The memory limited this job: reading the weights once in each step took {_percent(nbytes)} of the rate "
            f"that copying reached. Weights in fewer bits would help{_more_rows(report)}."
        )
    elif report.engine_seconds > 0 and report.peak_bytes_per_second:
        yield (
            f"Neither the arithmetic of the device ({_percent(operations)} of it) nor its memory "
            f"({_percent(nbytes)}) limited this job: the rest of a step's time goes to attention, sampling and the "
            f"work between products{_more_rows(report)}."
        )


def _other_products(report: Report) -> Iterator[str]:
    if report.predicted is None or not report.predicted.others:
        return
    name, seconds = min(report.predicted.others.items(), key=lambda item: item[1])
    now = report.predicted.seconds_for_lengths
    if seconds < FASTER * now:
        yield (
            f"With --quantization {name} generating is predicted to take {in_seconds(seconds)} instead of "
            f"{in_seconds(now)}; answers change, and batchinfer evaluate or --canary tells how much."
        )


def _drafts(report: Report) -> Iterator[str]:
    if report.drafted and report.accepted < 0.1 * report.drafted:
        yield (
            f"Only {_percent(report.accepted / report.drafted)} of the drafts were accepted; --speculative-config off "
            "would have saved what they cost."
        )


def _padding(report: Report) -> Iterator[str]:
    computed = report.prompt_tokens_computed + report.completion_tokens + report.padded_tokens
    if computed and report.padded_tokens > PADDED * computed:
        yield f"{_percent(report.padded_tokens / computed)} of the tokens computed were padding: the steps were small."


def _preempted(report: Report) -> Iterator[str]:
    if report.rows_computed and report.preemptions > PREEMPTED * report.rows_computed:
        yield (
            f"{count_of(report.preemptions, 'time')} a row was taken back because the KV cache was full, and computed "
            "again: give more memory with --kv-cache-memory-bytes, store it in fewer bits with --kv-cache-dtype int8, "
            "or run fewer rows side by side with --max-num-seqs."
        )


def _merging(report: Report) -> Iterator[str]:
    merging = report.phases["merge"] + report.phases["commit"]
    if merging > MERGING * report.machine_seconds:
        yield (
            f"Writing took {in_seconds(merging)}, {_percent(merging / report.machine_seconds)} of {_time(report)}: a "
            "faster disk, fewer --columns, or larger --commit-rows would help."
        )


def _kernels(report: Report) -> Iterator[str]:
    if report.settings.get("device") == "cpu" and report.settings.get("cpu_path") == REFERENCE:
        yield (
            "The kernels in C were not used: batchinfer doctor says why, and on most machines they are faster than "
            "the reference."
        )


def at_ceilings(report: Report) -> tuple[float, float]:
    """Return the shares of the device's operations and bytes a second that the steps reached; 0 if not measured."""
    ceiling = report.peak_bytes_per_second * report.engine_seconds
    return (report.percent_of_peak or 0.0) / 100, report.bytes_read / ceiling if ceiling > 0 else 0.0


def _more_rows(report: Report) -> str:
    """Name --max-num-seqs if more rows waited, in each shard, than ran side by side."""
    most = report.settings.get("max_num_seqs")
    if isinstance(most, int) and report.rows_computed > 2 * most * max(report.shards, 1) and not report.preemptions:
        return f"; more rows side by side than --max-num-seqs {most} may help"
    return ""


def _time(report: Report) -> str:
    return "the time of all shards" if report.shards else "the wall time"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


RULES: tuple[Callable[[Report], Iterator[str]], ...] = (
    _failures, _cut, _limit, _kernels, _other_products, _preempted, _drafts, _padding, _merging,
)  # fmt: skip
