"""The report of a job: `report.json`, and the same figures as a table for the terminal."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchinfer import __version__
from batchinfer.errors import Refused
from batchinfer.jobs.amounts import count_of, in_bytes, in_seconds, most_frequent
from batchinfer.jobs.canary import Canary
from batchinfer.jobs.forecast import Forecast
from batchinfer.jobs.log import printable
from batchinfer.jobs.results.glance import Answer
from batchinfer.jobs.results.run_folder import RunFolder, incremental_files

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Report:
    """The fields of `report.json`.

    The job tokenizes and commits while the engine computes. So phases overlap, and do not add up to `wall_seconds`.
    `generate_seconds` is the time from when the engine is ready to its last row. In `tokens_per_second`, `prefill` and
    `decode` are over their own phases, and `input`, `output` and `total` are over `generate_seconds`.

    Of merged shards, `wall_seconds` is the time from the first one's start to the last one's end, and rates of rows and
    of `input`, `output` and `total` are over it. All other seconds are those of the shards, added up.
    """

    schema_version: int
    output: str
    model: str
    rows: int
    rows_ok: int
    rows_failed: int
    rows_resumed: int
    rows_computed: int
    rows_duplicate: int
    rows_by_finish_reason: dict[str, int]
    rows_by_error: dict[str, int]
    prompt_tokens: int
    prompt_tokens_computed: int
    completion_tokens: int
    drafted: int
    accepted: int
    steps: int
    preemptions: int
    padded_tokens: int
    step_sizes: dict[str, int]  # tokens of a step, with padding -> number of steps
    buckets: dict[str, int]  # longest prompt of a bucket -> number of rows
    phases: dict[str, float]  # load, tokenize, prefill, decode, commit, merge: seconds
    generate_seconds: float
    wall_seconds: float
    tokens_per_second: dict[str, float]
    rows_per_second: float
    operations: int
    peak_operations_per_second: float
    percent_of_peak: float | None  # None if the peak was not measured
    peak_memory_bytes: dict[str, int]  # keys: parent (the job's process), engine, and gpu if it was used
    weight_bytes: int
    kv_cache_bytes: int
    device: str
    kernels: dict[str, str]
    notes: list[str]
    versions: dict[str, str]
    command: str
    canary: Canary | None = None
    predicted: Forecast | None = None  # None if the device was not measured
    rows_reused: int = 0  # with answers that earlier jobs have computed
    output_sha256: str = ""  # digest of the output; for a folder, of its files' names and digests
    forced: int = 0  # completion tokens that were the only ones their grammars allowed
    prompt_tokens_shared: int = 0  # not computed, since they were computed for another row
    kv_bytes_read: int = 0  # bytes of keys and values that attention read, in all layers; 0 on the CPU: not counted
    kv_bytes_unshared: int = 0  # what it would have read if every row had read the prefix it shares by itself
    experts_touched: float = 0.0  # experts of a layer that a step touched, in the mean; 0 on a GPU: not counted
    # How steps without prompt tokens ran on a GPU: replayed, recorded, launched (kernel by kernel) -> number of steps
    gpu_steps: dict[str, int] = field(default_factory=dict)
    # Input column -> number of its values that are not UTF-8 and have U+FFFD in place of their bytes in the output
    replaced_text: dict[str, int] = field(default_factory=dict)
    # Settings in the checkpoint's generation_config.json: those that were applied, and the others by the reason
    generation_config: dict[str, dict[str, Any]] = field(default_factory=dict)
    unparsed_tool_calls: int = 0  # answers of this run whose text looks like a tool call and does not parse
    completion_lengths: dict[str, int] = field(default_factory=dict)  # longest of a bucket -> samples of this run
    first_errors: dict[str, list[int]] = field(default_factory=dict)  # error code -> the first rows that have it
    answers: list[Answer] = field(default_factory=list)  # as many as --report-samples says
    settings: dict[str, Any] = field(default_factory=dict)  # of the engine, as they were resolved
    peak_bytes_per_second: float = 0.0  # of copying in memory; 0 if it was not measured
    ended: int = 0  # Unix time at which the job was complete
    shards: int = 0  # of which the output was merged; 0 for the output of a run
    shard_seconds: float = 0.0  # wall time of all shards, added up

    @property
    def engine_seconds(self) -> float:
        """Seconds in which the engine computed steps."""
        return self.phases["prefill"] + self.phases["decode"]

    @property
    def machine_seconds(self) -> float:
        """Wall time of the run, or of all shards, added up."""
        return self.shard_seconds if self.shards else self.wall_seconds

    @property
    def bytes_read(self) -> int:
        """Bytes of the weights, which each step reads once, and of keys and values where they were counted."""
        return self.steps * self.weight_bytes + self.kv_bytes_read

    def table(self) -> str:
        """Return the report as aligned lines, without colour."""
        rate, memory = self.tokens_per_second, self.peak_memory_bytes
        computed = self.prompt_tokens_computed + self.completion_tokens
        sources = f"{self.prompt_tokens_computed:,} computed, {self.prompt_tokens_shared:,} shared"
        if (others := self.prompt_tokens - self.prompt_tokens_computed - self.prompt_tokens_shared) > 0:
            sources += f", {others:,} of rows answered before or like others"
        right = f"{self.accepted:,} accepted ({_percent(self.accepted, self.drafted)})"
        lines = [
            ("output", self.output),
            *([("shards", f"{self.shards:,}, merged")] if self.shards else []),
            ("model", self.model),
            ("device", self.device or "none, since no model was loaded"),
            ("rows", f"{self.rows:,} ({self.rows_ok:,} ok, {self.rows_failed:,} failed)"),
            *([("  done before", f"{self.rows_resumed:,}")] if self.rows_resumed else []),
            *([("  reused", count_of(self.rows_reused, "row"))] if self.rows_reused else []),
            *([("  duplicates", count_of(self.rows_duplicate, "row"))] if self.rows_duplicate else []),
            *[(f"  {code}", count_of(count, "row")) for code, count in self.rows_by_error.items()],
            ("prompt tokens", f"{self.prompt_tokens:,} ({sources})"),
            ("completion tokens", f"{self.completion_tokens:,}"),
            *([("unparsed calls", self._unparsed())] if self.unparsed_tool_calls else []),
            *([("drafts", f"{self.drafted:,} drafted, {right}")] if self.drafted else []),
            *([("forced tokens", f"{self.forced:,} taken without the model")] if self.forced else []),
            *self._times(),
            *[(f"  {name}", in_seconds(seconds)) for name, seconds in self.phases.items()],
            *([] if self.predicted is None else self.predicted.lines()),
            ("rows/s", f"{self.rows_per_second:,.2f}"),
            ("tokens/s", f"input {rate['input']:,.1f}, output {rate['output']:,.1f}, total {rate['total']:,.1f}"),
            ("  by phase", f"prefill {rate['prefill']:,.1f}, decode {rate['decode']:,.1f}"),
        ]
        if self.percent_of_peak is not None:
            peak = f"{self.percent_of_peak:.1f} % of {self.peak_operations_per_second / 1e9:,.0f} GOP/s, as measured"
            lines.append(("arithmetic", peak))
        lines += [
            ("peak memory", ", ".join(f"{name} {in_bytes(size)}" for name, size in memory.items())),
            ("  in the engine", f"weights {in_bytes(self.weight_bytes)}, KV cache {in_bytes(self.kv_cache_bytes)}"),
            *([("keys and values", self._reads())] if self.kv_bytes_read else []),
            ("steps", f"{self.steps:,}, preemptions {self.preemptions:,}"),
            *([("  decoding", _on_gpu(self.gpu_steps))] if any(self.gpu_steps.values()) else []),
            *([("  experts", f"{self.experts_touched:,.1f} of a layer touched")] if self.experts_touched else []),
            ("  tokens: steps", most_frequent(self.step_sizes)),
            ("prompt lengths", most_frequent(self.buckets)),
            ("padding", f"{_percent(self.padded_tokens, computed + self.padded_tokens)} of the tokens computed"),
            *([] if self.canary is None else self.canary.lines()),
            *[("kernel " + op, path) for op, path in self.kernels.items()],
            *[("note", note) for note in self.notes],
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join(printable(f"{name:<{width}}  {value}".rstrip()) for name, value in lines)

    def _times(self) -> list[tuple[str, str]]:
        wall, generating = in_seconds(self.wall_seconds), f"of which generating {in_seconds(self.generate_seconds)}"
        if not self.shards:
            return [("wall time", f"{wall}, {generating}")]
        span = f"{wall}, from the first shard's start to the last one's end"
        return [("wall time", span), ("time of shards", f"{in_seconds(self.shard_seconds)}, {generating}")]

    def _unparsed(self) -> str:
        one = self.unparsed_tool_calls == 1
        return (
            f"{self.unparsed_tool_calls:,} {'answer has' if one else 'answers have'} what looks like a tool call and "
            "does not parse; it is in generated_text"
        )

    def _reads(self) -> str:
        read, unshared = in_bytes(self.kv_bytes_read), in_bytes(self.kv_bytes_unshared)
        fewer = self.kv_bytes_read < self.kv_bytes_unshared
        return f"{read} read" + (f", {unshared} without shared prefixes" if fewer else "")


def read_report(output: Path) -> Report:
    """Return the report of the job that wrote `output`; for an incremental output, the report of its last file.

    Raises `Refused` if there is no job, no report, or if it has another schema version.
    """
    folder = report_folder(output)
    path = folder.report
    try:
        values = json.loads(path.read_text("utf-8"))
        version = values["schema_version"]
        if version != SCHEMA_VERSION:
            raise Refused(f"report {path} has schema_version {version}; this batchinfer reads only {SCHEMA_VERSION}")
        canary, predicted = values.get("canary"), values.get("predicted")
        parts = {
            "canary": None if canary is None else Canary(**canary),
            "predicted": None if predicted is None else Forecast(**predicted),
            "answers": [Answer(**answer) for answer in values.get("answers", [])],
        }
        return Report(**{**values, **parts})
    except OSError as error:
        folder.refuse_unbegun()
        raise Refused(
            f"report {path} cannot be read: {error.strerror}; it is written when its job is complete"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise Refused(
            f"report {path} is not a report of batchinfer: {error}; run the job anew with --overwrite"
        ) from error


def report_folder(output: Path) -> RunFolder:
    """Return the run folder that has the report of `output`; for an incremental output, that of its last file."""
    return RunFolder([output, *incremental_files(output)][-1])


def rates(tokens: Mapping[str, float], seconds: dict[str, float]) -> dict[str, float]:
    """Return tokens a second by kind; 0 if no time passed."""
    return {kind: tokens[kind] / seconds[kind] if seconds[kind] > 0 else 0.0 for kind in tokens}


def versions() -> dict[str, str]:
    """Return the versions of batchinfer, Python and the main packages, without importing them."""
    packages = ("torch", "triton", "tokenizers", "pyarrow", "numpy")
    installed = {dist.name: dist.version for dist in map(_distribution, packages) if dist is not None}
    return {"batchinfer": __version__, "python": platform.python_version(), **installed}


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _on_gpu(steps: dict[str, int]) -> str:
    counts = f"{steps['replayed']:,} replayed, {steps['recorded']:,} recorded, {steps['launched']:,} launched"
    return f"{counts} kernel by kernel"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole if whole else 0:.1f} %"
