"""Planning a job before its weights are loaded: which rows can run, how long they are, how long the job will take."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchinfer.cost.cost_model import Requests
from batchinfer.engine.config import EngineConfig
from batchinfer.jobs.advised_order import AdvisedOrder, advised_order
from batchinfer.jobs.amounts import count_of, in_bytes, in_seconds, most_frequent
from batchinfer.jobs.job_columns import fields_of
from batchinfer.jobs.log import printable
from batchinfer.jobs.plan.comparison import Candidate, Comparison, compare, cost_model, room_for_keys
from batchinfer.jobs.plan.device_file import DeviceKey, read_device_cost
from batchinfer.jobs.plan.histogram import bars
from batchinfer.jobs.plan.prediction import Job, JobShape, Prediction, Setting
from batchinfer.jobs.plan.quality_file import read_qualities
from batchinfer.jobs.preflight import Preflight, preflight
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.rows.duplicates import told_alike
from batchinfer.jobs.rows.length_figures import LengthFigures
from batchinfer.jobs.rows.reuse import Reuse
from batchinfer.jobs.rows.windows import Windows
from batchinfer.jobs.spec import JobSpec

SCHEMA_VERSION = 1
# stands for the output, which a plan does not have; it is in no input folder
NOWHERE = Path(os.devnull) / "plan.parquet"


@dataclass(frozen=True)
class Failing:
    """Rows that cannot run for the same reason."""

    rows: int
    first: int  # ordinal of the first of them

    def __str__(self) -> str:
        return f"{count_of(self.rows, 'row')}, first row {self.first}"


@dataclass(frozen=True)
class Outlook:
    """The fields of `plan --json`. Times are None, with a note, if the device was not measured."""

    schema_version: int
    model: str
    device: str
    rows: int
    rows_done: int  # done by an earlier run
    rows_reused: int  # with answers that earlier jobs have computed
    rows_to_run: int
    rows_failing: dict[str, Failing]  # by error_code
    duplicates: int  # rows that get the result of another row
    duplicate_tokens: int  # tokens of their prompts
    groups: int  # groups of rows whose prompts begin with the same tile
    grouped_rows: int  # rows in these groups
    shared_tokens: int  # prompt tokens that are computed once for several rows
    prompt_tokens: int
    longest_prompt: int
    median_prompt: int
    prompt_lengths: dict[str, int]  # longest prompt of a bucket -> number of rows
    most_new_tokens: int
    short_of_context: int  # rows that may have fewer than max_tokens new tokens, because their prompts are long
    share_cut: float | None  # of answers of usual lengths, that would be cut; None if all rows take what they may
    kv_cache: str  # type of keys and values
    kv_cache_bytes: int  # most that are in use at the same time
    state_bytes: int  # of the rows side by side, in layers that keep a state; snapshots may take as much again
    step_sizes: dict[str, int]  # tokens of a step, with padding -> number of steps, by the central estimate
    operations: float  # if each row generates all tokens that it may
    kv_bytes_read: float
    products: str
    prediction: Prediction | None
    comparison: Comparison | None
    places: int  # rows side by side
    # Rows side by side -> least useful acceptance rate of drafts; None: they never pay
    drafts_pay: dict[str, float | None]
    field_order: AdvisedOrder | None  # of the prompt template, if another one shares notably more
    notes: list[str]

    def json(self) -> dict[str, Any]:
        """Return the fields for `--json`."""
        return asdict(self)

    def text(self, width: int | None) -> str:
        """Return aligned lines and a histogram of `width` columns; for None, the histogram has ASCII characters
        only."""
        can = "left to run" if self.rows_done else "can run"
        reused = count_of(self.rows_reused, "row")
        duplicates = count_of(self.duplicate_tokens, "token")
        alike = f"{count_of(self.grouped_rows, 'row')} in {count_of(self.groups, 'group')}"
        lines = [
            ("model", self.model),
            ("device", self.device),
            ("rows", f"{self.rows:,}; {self.rows_to_run:,} of them {can}"),
            *([("  done before", f"{self.rows_done:,}")] if self.rows_done else []),
            *([("  reused", f"{reused} with answers in earlier outputs")] if self.rows_reused else []),
            *[(f"  {code}", str(failing)) for code, failing in self.rows_failing.items()],
            (
                "prompt tokens",
                f"{self.prompt_tokens:,}; median {self.median_prompt:,}, longest {self.longest_prompt:,}",
            ),
            ("  duplicates", f"{count_of(self.duplicates, 'row')} with {duplicates}, not computed again"),
            ("  shared", f"{count_of(self.shared_tokens, 'token')}; {alike} begin alike"),
            ("new tokens", f"{self.most_new_tokens:,} at most"),
            *self._cut(),
            ("KV cache", f"{in_bytes(self.kv_cache_bytes)} in {self.kv_cache} at its fullest"),
            *([("  states", self._states())] if self.state_bytes else []),
            ("steps", f"{sum(self.step_sizes.values()):,}"),
            ("  tokens: steps", most_frequent(self.step_sizes)),
            ("operations", f"{self.operations:.3g} with all new tokens; KV read {in_bytes(self.kv_bytes_read)}"),
            *self._times(),
            *([("field order", str(self.field_order))] if self.field_order is not None else []),
            *[("note", note) for note in self.notes],
        ]
        wide = max(len(name) for name, _ in lines)
        table = [printable(f"{name:<{wide}}  {value}".rstrip()) for name, value in lines]
        lengths = ["", "prompt lengths", *bars(_labelled(self.prompt_lengths), width)] if self.rows_to_run else []
        return "\n".join([*table, *lengths])

    def _times(self) -> list[tuple[str, str]]:
        lines = []
        if (p := self.prediction) is not None:
            before = p.start_seconds + p.load_seconds
            low, high = in_seconds(before + p.low), in_seconds(before + p.high)
            lines = [
                ("predicted", f"{in_seconds(p.wall_seconds)} without drafts ({low} to {high})"),
                ("  start, load", f"{in_seconds(p.start_seconds)}, {in_seconds(p.load_seconds)}"),
                ("  prefill, decode", f"{in_seconds(p.prefill_seconds)}, {in_seconds(p.decode_seconds)}"),
            ]
        if self.comparison is not None:
            lines += self.comparison.lines(Setting(self.products, self.kv_cache), self.places)
        if self.drafts_pay:
            lines.append(("drafts pay", "; ".join(_pays(*item) for item in self.drafts_pay.items())))
        return lines

    def _cut(self) -> list[tuple[str, str]]:
        """Say which answers may be cut short."""
        lines = []
        if self.short_of_context:
            lines.append(("  cut by context", f"{count_of(self.short_of_context, 'row')} without room for as many"))
        if self.share_cut:
            lines.append(("  cut at the end", f"{100 * self.share_cut:.0f} % of answers, if they are as long as usual"))
        return lines

    def _states(self) -> str:
        beside = ", and up to as much again for what rows share" if self.shared_tokens else ""
        return f"{in_bytes(self.state_bytes)} of the rows side by side{beside}"


def plan(spec: JobSpec) -> Outlook:
    """Read and tokenize all rows that are not done, without loading weights. Raises what `run` would raise before its
    first row."""
    job = preflight(spec)
    spec = job.spec
    done = _done(spec, job)
    with TemporaryDirectory(prefix="batchinfer-plan-") as folder:
        reuse = Reuse.of(spec.reuse, job.fingerprints, fields_of(spec))
        blocks, grain = job.config.block_size, job.config.prefix_grain
        windows = Windows(job.table, job.source, blocks, done, Path(folder), reuse=reuse, grain=grain)
        failing = _read(windows)
    by_row = spec.sampled_by_row
    shape = JobShape.of(windows.figures, spec.sampling, job.config.max_model_len, by_row)
    key = DeviceKey.of(job.config.device, job.config.cpu_path)
    cost, missing = read_device_cost(key)
    setting, notes = Setting.of(job.config), [*job.shape.notes, *job.notes]
    if missing is not None:
        notes.append(missing)
    notes += told_alike(spec, windows.figures)
    if windows.figures.label_tokens:
        notes.append(
            f"steps and times leave out the labels, which have {count_of(windows.figures.label_tokens, 'token')} "
            f"beside {windows.figures.prompt_tokens:,} of prompts"
        )
    if by_row and windows.figures.rows:
        notes.append(
            "the prediction takes the mean of the rows' max_tokens for each row, and other params from the flags"
        )
    if spec.incremental:
        notes.append("the plan is for all rows, including those that earlier runs have done")
    simulated = Job(shape, job.config) if windows.figures.rows else None
    advised = None if done.any() or windows.rows_reused else advised_order(job, windows.figures)
    prediction, comparison, drafts_pay = None, None, {}
    if simulated is not None and cost is not None:
        digest = job.fingerprints["model"]
        comparison = compare(simulated, windows.figures, cost, read_qualities(digest), room_for_keys(simulated))
        if simulated.measured(cost, setting):
            prediction = simulated.predict(cost, setting)
            side_by_side = min(job.config.max_num_seqs, simulated.shape.rows)
            few = [rows for rows in (1, 4, 16, 64, 256) if rows < side_by_side]
            drafts_pay = {str(n): simulated.drafts_pay(n, cost, setting) for n in [*few, side_by_side]}
            if advised is not None:
                more = replace(shape, shared_tokens=shape.shared_tokens + advised.shared_tokens)
                sooner = Job(more, job.config).predict(cost, setting)
                advised = replace(advised, seconds=prediction.generate_seconds - sooner.generate_seconds)
        else:
            notes.append(
                f"{setting.products} with keys and values in {setting.kv_cache} was not measured on this device, so "
                "that no time is predicted"
            )
        if (unknown := comparison.unknown(setting)) is not None:
            notes.append(_how_to_know(spec, unknown))
    return Outlook(
        schema_version=SCHEMA_VERSION,
        model=spec.model,
        device=f"{key.device}, {count_of(key.cores, 'core')}" if job.config.device == "cpu" else key.device,
        rows=job.table.num_rows,
        rows_done=int(done.sum()),
        rows_reused=windows.rows_reused,
        rows_to_run=windows.figures.rows,
        rows_failing=failing,
        kv_cache=setting.kv_cache,
        step_sizes={} if simulated is None else {str(s): count for s, count in simulated.step_sizes().items()},
        products=setting.products,
        prediction=prediction,
        comparison=comparison,
        places=min(job.config.max_num_seqs, max(shape.rows, 1)),
        short_of_context=0 if simulated is None else shape.short_of_context,
        share_cut=None if simulated is None or shape.sampling.ignore_eos or spec.chooses else shape.share_cut,
        drafts_pay=drafts_pay,
        field_order=advised,
        notes=notes,
        **_lengths(windows.figures),
        **_demands(simulated, windows.figures, job.config, setting),
    )


def _done(spec: JobSpec, job: Preflight) -> NDArray[np.bool_]:
    """Return whether an earlier run of this job has done each row [rows]."""
    if spec.overwrite or spec.incremental:
        return np.zeros(job.table.num_rows, np.bool_)
    folder = RunFolder(spec.output)
    folder.refuse_foreign()
    return folder.read(job.fingerprints, job.table.num_rows, spec.retry_errors).rows


def _read(windows: Windows) -> dict[str, Failing]:
    """Read all rows. Returns the rows that cannot run, by error code."""
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    while windows.reading:
        for row, error in sorted(windows.read().items()):
            counts[error.code] += 1
            first.setdefault(error.code, row)
        windows.pass_over()
    return {code: Failing(count, first[code]) for code, count in counts.most_common()}


def _lengths(figures: LengthFigures) -> dict[str, Any]:
    return {
        "duplicates": figures.duplicates,
        "duplicate_tokens": figures.duplicate_tokens,
        "groups": figures.groups,
        "grouped_rows": figures.grouped_rows,
        "shared_tokens": figures.shared_tokens,
        "prompt_tokens": figures.prompt_tokens,
        "longest_prompt": figures.quantile(1.0),
        "median_prompt": figures.quantile(0.5),
        "prompt_lengths": {str(edge): rows for edge, rows in figures.buckets.items()},
    }


def _demands(job: Job | None, figures: LengthFigures, config: EngineConfig, setting: Setting) -> dict[str, Any]:
    """Return new tokens, memory and operations of the rows that run, as if no prompt were shared; zeros if no row can
    run. They do not depend on the device's speed."""
    if job is None:
        names = ("most_new_tokens", "kv_cache_bytes", "state_bytes", "operations", "kv_bytes_read")
        return dict.fromkeys(names, 0)
    lengths = np.arange(len(job.shape.lengths))
    most = np.maximum(job.shape.most_tokens(lengths), 0)
    model = cost_model(job.model, setting)
    total = int(most @ job.shape.lengths)
    tokens = figures.kv_cache_tokens(config.max_num_seqs)
    each = [
        (Requests(length, int(most[length])), int(job.shape.lengths[length]))
        for length in np.flatnonzero(job.shape.lengths).tolist()
    ]
    return {
        "most_new_tokens": total,
        "kv_cache_bytes": tokens * model.kv_bytes_per_token,
        "state_bytes": min(config.usual_batch, job.shape.rows) * model.state_bytes,
        "operations": sum(rows * model.operations(requests) for requests, rows in each),
        "kv_bytes_read": sum(rows * model.bytes_read(requests) for requests, rows in each),
    }


def _how_to_know(spec: JobSpec, candidate: Candidate) -> str:
    """Say how to find out what a faster way costs in quality."""
    data, column = (spec.inputs[0], spec.prompt_column) if spec.prompt_column else ("FILE", "COLUMN")
    flags = f"--quantization {candidate.quantization} --kv-cache-dtype {candidate.kv_cache}"
    return (
        f"{candidate} would take {in_seconds(candidate.generate_seconds)} of generating, and what it costs in quality "
        f"is not known; batchinfer evaluate {spec.model} --reference {spec.model} {flags} --data {data} --column "
        f"{column} measures it"
    )


def _pays(rows: str, right: float | None) -> str:
    """Say from which share of right drafts on they pay, with so many rows side by side."""
    when = "never" if right is None else f"if {100 * right:.0f} % or more are right"
    return f"{count_of(int(rows), 'row')}: {when}"


def _labelled(buckets: Mapping[str, int]) -> dict[str, int]:
    edges = [0, *map(int, buckets)]
    return {f"{below + 1}-{edge}": buckets[str(edge)] for below, edge in pairwise(edges)}
