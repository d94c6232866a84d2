"""What a job did, in numbers: `report.json`, and the same as a table on the terminal."""

import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path

from batchinfer import __version__
from batchinfer.errors import Refused
from batchinfer.jobs.amounts import in_bytes, in_seconds, most_frequent
from batchinfer.jobs.canary import Canary
from batchinfer.jobs.log import printable
from batchinfer.jobs.results.run_folder import RunFolder, grown_files

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Forecast:
    """Seconds of generating that were to be expected if no draft were right, to stand beside `generate_seconds`."""

    seconds: float  # before the run, by the central estimate of output lengths
    low: float
    high: float
    seconds_for_lengths: float  # for the lengths that came: what is left is the cost model's own error

    def lines(self) -> list[tuple[str, str]]:
        """Of the report's table."""
        range_ = f"{in_seconds(self.low)} to {in_seconds(self.high)}"
        return [
            ("predicted", f"{in_seconds(self.seconds)} of generating without drafts ({range_})"),
            ("  for the lengths", f"{in_seconds(self.seconds_for_lengths)}, had they been known"),
        ]


@dataclass(frozen=True)
class Report:
    """The fields of `report.json`.

    The parent tokenizes and commits while the engine computes, so phases overlap and do not add up to `wall_seconds`.
    `generate_seconds` is from the engine's readiness to its last row; `tokens_per_second` holds `prefill` and `decode`
    over their own phases, `input`, `output` and `total` over `generate_seconds`.
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
    step_sizes: dict[str, int]  # tokens of a step, padded -> steps
    buckets: dict[str, int]  # longest prompt of a bucket -> rows
    phases: dict[str, float]  # load, tokenize, prefill, decode, commit, merge: seconds
    generate_seconds: float
    wall_seconds: float
    tokens_per_second: dict[str, float]
    rows_per_second: float
    operations: int
    peak_operations_per_second: float
    percent_of_peak: float | None  # None where the peak was not measured
    peak_memory_bytes: dict[str, int]  # parent, engine; gpu, where there is one
    weight_bytes: int
    kv_cache_bytes: int
    device: str
    kernels: dict[str, str]
    notes: list[str]
    versions: dict[str, str]
    command: str
    canary: Canary | None = None
    predicted: Forecast | None = None  # None where the device was not measured
    output_sha256: str = ""  # of the output's bytes
    prompt_tokens_shared: int = 0  # not computed, for another row had them

    def table(self) -> str:
        """The report as aligned lines, without colour."""
        rate, memory = self.tokens_per_second, self.peak_memory_bytes
        computed = self.prompt_tokens_computed + self.completion_tokens
        sources = f"{self.prompt_tokens_computed:,} computed, {self.prompt_tokens_shared:,} shared"
        right = f"{self.accepted:,} accepted ({_percent(self.accepted, self.drafted)})"
        lines = [
            ("output", self.output),
            ("model", self.model),
            ("device", self.device),
            ("rows", f"{self.rows:,} ({self.rows_ok:,} ok, {self.rows_failed:,} failed)"),
            *([("  done before", f"{self.rows_resumed:,}")] if self.rows_resumed else []),
            *([("  like another row", f"{self.rows_duplicate:,}")] if self.rows_duplicate else []),
            *[(f"  {code}", f"{count:,} rows") for code, count in self.rows_by_error.items()],
            ("prompt tokens", f"{self.prompt_tokens:,} ({sources})"),
            ("completion tokens", f"{self.completion_tokens:,}"),
            *([("drafts", f"{self.drafted:,} drafted, {right}")] if self.drafted else []),
            ("wall time", f"{in_seconds(self.wall_seconds)}, of which generating {in_seconds(self.generate_seconds)}"),
            *[(f"  {name}", in_seconds(seconds)) for name, seconds in self.phases.items()],
            *([] if self.predicted is None else self.predicted.lines()),
            ("rows/s", f"{self.rows_per_second:,.2f}"),
            ("tokens/s", f"input {rate['input']:,.1f}, output {rate['output']:,.1f}, total {rate['total']:,.1f}"),
            ("  by phase", f"prefill {rate['prefill']:,.1f}, decode {rate['decode']:,.1f}"),
        ]
        if self.percent_of_peak is not None:
            peak = f"{self.percent_of_peak:.1f} % of {self.peak_operations_per_second / 1e9:,.0f} GOP/s as measured"
            lines.append(("arithmetic", peak))
        lines += [
            ("peak memory", ", ".join(f"{name} {in_bytes(size)}" for name, size in memory.items())),
            ("  of the engine's", f"weights {in_bytes(self.weight_bytes)}, KV cache {in_bytes(self.kv_cache_bytes)}"),
            ("steps", f"{self.steps:,}, preemptions {self.preemptions:,}"),
            ("  tokens: steps", most_frequent(self.step_sizes)),
            ("prompt lengths", most_frequent(self.buckets)),
            ("padding", f"{_percent(self.padded_tokens, computed + self.padded_tokens)} of the tokens computed"),
            *([] if self.canary is None else self.canary.lines()),
            *[("kernel " + op, path) for op, path in self.kernels.items()],
            *[("note", note) for note in self.notes],
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join(printable(f"{name:<{width}}  {value}".rstrip()) for name, value in lines)


def read_report(output: Path) -> Report:
    """The report of the job that wrote `output`, of a folder that grows the last one.

    Raises `Refused` where there is none, or of another version.
    """
    path = RunFolder([output, *grown_files(output)][-1]).report
    try:
        values = json.loads(path.read_text("utf-8"))
        version = values["schema_version"]
        if version != SCHEMA_VERSION:
            raise Refused(f"report {path} has schema_version {version}; this batchinfer reads {SCHEMA_VERSION}")
        canary, predicted = values.get("canary"), values.get("predicted")
        parts = {
            "canary": None if canary is None else Canary(**canary),
            "predicted": None if predicted is None else Forecast(**predicted),
        }
        return Report(**{**values, **parts})
    except OSError as error:
        raise Refused(f"report {path}: {error.strerror}; it is written when a job is complete") from error
    except (ValueError, TypeError, KeyError) as error:
        raise Refused(f"report {path} is no report of batchinfer: {error}") from error


def rates(tokens: dict[str, int], seconds: dict[str, float]) -> dict[str, float]:
    """Tokens a second by kind; 0 where no time passed."""
    return {kind: tokens[kind] / seconds[kind] if seconds[kind] > 0 else 0.0 for kind in tokens}


def versions() -> dict[str, str]:
    """What ran: names to versions, read without importing them."""
    packages = ("torch", "triton", "tokenizers", "pyarrow", "numpy")
    installed = {dist.name: dist.version for dist in map(_distribution, packages) if dist is not None}
    return {"batchinfer": __version__, "python": platform.python_version(), **installed}


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole if whole else 0:.1f} %"
