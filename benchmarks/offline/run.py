"""What knowing the whole job is worth: `make bench-offline`.

The same tables through the whole path of a job, each feature added to those before it, in turns; seconds are from the
engine's being ready to its last row. Outputs must be the same in all of them.
"""

import statistics
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))

import openvino_int8
from conditions import conditions
from sections import Sections, jobs
from workloads import (
    REPOSITORY,
    TARGET,
    Text,
    Workload,
    fixed_drafters,
    sampling_of,
    write_jsonl,
    write_rows,
)  # fmt: skip

from batchinfer.engine.config import Speculation
from batchinfer.engine.request import Requests, RowError
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.jobs.bench import TOKEN_IDS
from batchinfer.jobs.job import run
from batchinfer.jobs.report import Report
from batchinfer.jobs.spec import JobSpec
from batchinfer.text.tokenizer import Tokenizer

PEER = "OpenVINO GenAI int8"
RESULTS = REPOSITORY / "benchmarks" / "results"
ABOUT = (
    "Seconds from the engine's being ready to its last row, median of the runs in turns; tokens are prompts and "
    "answers, as if none had been shared. Each variant has what those before it have, but of the drafters there is one "
    'at a time, at every step; "all" chooses. The answers are the same in all of them.'
)
OFF = Speculation("off")
PLAIN = {"deduplicate": False, "prefix_sharing": False, "learned_admission": False, "speculation": OFF}
DUPLICATES = PLAIN | {"deduplicate": True}
PREFIX = DUPLICATES | {"prefix_sharing": True}
LEARNED = PREFIX | {"learned_admission": True}


def variants(draft: Path | None) -> dict[str, dict[str, Any]]:
    """Names to fields of `JobSpec`."""
    return {
        "plain": PLAIN,
        "+ duplicates": DUPLICATES,
        "+ prefix": PREFIX,
        "+ learned admission": LEARNED,
        **{f"+ {name}": LEARNED | {"speculation": speculation} for name, speculation in fixed_drafters(draft).items()},
        "all": LEARNED | {"speculation": Speculation("auto", model=draft)},
    }


class RowPrompts:
    """Prompts that are token ids, each with new tokens of its own; rows are sampled by their prompts."""

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer, max_model_len: int, schema: pa.Schema) -> None:
        self.columns = [TOKEN_IDS, "max_tokens"]
        self._sampling = spec.sampling

    def tokenize(self, first_row: int, batch: pa.RecordBatch) -> tuple[Requests, dict[int, RowError]]:
        """Requests of all rows."""
        column, n = batch.column(TOKEN_IDS), batch.num_rows
        offsets = np.append(0, np.cumsum(column.value_lengths().to_numpy())).astype(np.int64)
        lengths, index = np.unique(batch.column("max_tokens").to_numpy(), return_inverse=True)
        params = SamplingTable.of([replace(self._sampling, max_tokens=int(length)) for length in lengths])
        ids = column.flatten().to_numpy()
        seeds = np.array([zlib.crc32(ids[a:b].tobytes()) for a, b in pairwise(offsets)])
        rows = np.arange(first_row, first_row + n)
        return Requests(rows, ids, offsets, seeds.astype(np.uint64), params, index.astype(np.int32)), {}


@dataclass(frozen=True)
class Measured:
    """One run of a variant."""

    seconds: float
    tokens_per_second: float  # of prompts and answers, as if nothing had been shared
    report: Report | None  # None: another engine's


def measure(workload: Workload, table: Path, model: Path, fields: dict[str, Any], folder: Path) -> Measured:
    """Run the job once; its answers stay in the folder."""
    longest = max(len(row[TOKEN_IDS]) + row["max_tokens"] for row in pq.read_table(table).to_pylist())
    spec = JobSpec(
        inputs=(table,),
        output=folder / "answers.parquet",
        model=str(model),
        tokenizer=str(TARGET),
        prompt_column=TOKEN_IDS,
        columns=("id",),
        sampling=sampling_of(workload),
        quantization="w8a8-int8",
        max_model_len=longest,
        random_weights=model != TARGET,
        max_num_seqs=workload.max_num_seqs,
        kv_cache_memory_bytes=workload.kv_cache_memory_bytes,
        overwrite=True,
        **fields,
    )
    report = run(spec, prompts=RowPrompts)
    seconds = report.generate_seconds
    return Measured(seconds, (report.prompt_tokens + report.completion_tokens) / seconds, report)


def in_turns(
    workload: Workload, model: Path, draft: Path | None, chosen: list[str], repeats: int, text: Text, peer: bool
) -> Iterator[tuple[str, Measured]]:
    """A B C A B C, so that a slow minute of the machine falls on all alike. `SystemExit` where answers differ."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, path = Path(scratch), Path(scratch) / "rows.parquet"
        rows = workload.rows(text)
        write_rows(rows, path)
        write_jsonl(rows, folder / "rows.jsonl")
        tokens = sum(len(prompt) + new for prompt, new in rows)
        first: pa.Table | None = None
        for _ in range(repeats):
            for name, fields in variants(draft).items():
                if name not in chosen:
                    continue
                measured = measure(workload, path, model, fields, folder)
                answers = pq.read_table(folder / "answers.parquet")
                first = answers if first is None else first
                if not answers.equals(first):
                    raise SystemExit(f"{workload.name}: {name} gives other answers than the first variant")
                typer.echo(f"{model.name}, {workload.name}, {name}: {measured.seconds:.2f} s", err=True)
                yield name, measured
            if peer:
                seconds = openvino_int8.seconds_of_rows(folder / "rows.jsonl")
                typer.echo(f"{model.name}, {workload.name}, {PEER}: {seconds:.2f} s", err=True)
                yield PEER, Measured(seconds, tokens / seconds, None)


def write_workloads(only: str, folder: Path) -> None:
    """The rows that other engines' runners take: a file `MODEL-NAME.jsonl` for each workload."""
    folder.mkdir(parents=True, exist_ok=True)
    for label, _, _, workload in jobs(only):
        path = folder / f"{label.replace('/', '-').replace(' ', '-')}.jsonl"
        write_jsonl(workload.rows(Text()), path)
        typer.echo(path)


def counts(report: Report | None) -> dict[str, int]:
    """What a run computed; nothing is known of another engine's."""
    names = ("steps", "prompt_tokens_computed", "drafted", "accepted", "preemptions")
    return {} if report is None else {name: getattr(report, name) for name in names}


def table(runs: dict[str, list[Measured]]) -> list[str]:
    """In Markdown; each variant beside the first in the same turn."""
    plain = next(iter(runs.values()))
    lines = [
        "| variant | seconds | spread | tokens/s | of plain | spread | steps | prompt tokens computed | drafts right "
        "| preempted |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, measured in runs.items():
        seconds = [m.seconds for m in measured]
        ratios = [before.seconds / m.seconds for before, m in zip(plain, measured, strict=False)]
        known = counts(measured[-1].report)
        steps, prompt, drafted, accepted, preempted = (f"{n:,}" for n in known.values()) if known else "-" * 5
        lines.append(
            f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} | "
            f"{statistics.median(m.tokens_per_second for m in measured):,.0f} | {statistics.median(ratios):.2f} | "
            f"{min(ratios):.2f} to {max(ratios):.2f} | {steps} | {prompt} | {accepted} of {drafted} | {preempted} |"
        )
    return lines


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each variant.")] = 3,
    only: Annotated[str, typer.Option(help="Workloads, with commas between: MODEL/NAME. Results of others stay.")] = "",
    chosen: Annotated[str, typer.Option("--variants", help="Variants, with commas between.")] = "",
    peer: Annotated[
        bool, typer.Option(help=f"Also {PEER}, on the large shape; installed first where missing.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Written with .json and .md.")] = RESULTS / "offline",
    rows: Annotated[
        Path | None, typer.Option(help="Measure nothing; write each workload's rows to this folder, as JSONL.")
    ] = None,
) -> None:
    """Measure what each feature adds, workload by workload, and write one table."""
    if rows is not None:
        write_workloads(only, rows)
        return
    versions = [openvino_int8.prepare()] if peer else []
    sections = Sections(output, "What knowing the whole job is worth", ABOUT)
    for label, model, draft, workload in jobs(only):
        ran = "; ".join([*conditions().values(), *versions])
        runs: dict[str, list[Measured]] = {}
        names = chosen.split(",") if chosen else list(variants(draft))
        for name, measured in in_turns(workload, model, draft, names, repeats, Text(), peer and draft is None):
            runs.setdefault(name, []).append(measured)
        sections.put(
            label,
            f"{workload.about}. {repeats} turns; {ran}.",
            table(runs),
            seconds={name: [m.seconds for m in measured] for name, measured in runs.items()},
            counts={name: counts(measured[-1].report) for name, measured in runs.items()},
        )
    typer.echo(sections.text())


if __name__ == "__main__":
    typer.run(main)
