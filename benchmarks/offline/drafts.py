"""What drafts are worth, beside none, at every moment of the machine: `make bench-drafts`.

A job's seconds move by a fifth from one run to the next where other machines share the processor. So the engines stand
side by side in one process, and the one that has had the least time so far goes on: a slow minute falls on all alike.
Answers must be the same.
"""

import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conditions import conditions
from sections import Sections, jobs
from workloads import REPOSITORY, TARGET, Rows, Text, Workload, fixed_drafters, sampling_of

from batchinfer.engine.config import EngineConfig, EngineStats, Speculation
from batchinfer.engine.engine import Engine
from batchinfer.engine.own_engine import own_engine
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.text.tokenizer import Tokenizer

RESULTS = REPOSITORY / "benchmarks" / "results"
ABOUT = (
    "Engines side by side in one process, in turns of a quarter of a second: a slow minute falls on all alike. Seconds "
    "are each engine's own. The plain engine shares nothing; all others share what prompts have in common. N-grams, "
    "suffix and draft model draft at every step; auto chooses. The answers are the same."
)
TURN_SECONDS = 0.25
PLAIN, OFF, AUTO = "plain", "no drafts", "auto"


@dataclass
class Runner:
    """One engine, its seconds, and what it has answered."""

    engine: Engine
    seconds: float = 0.0
    answers: dict[int, list[int]] = field(default_factory=dict)

    def go_on(self) -> None:
        """For a turn, or to the end."""
        started = time.perf_counter()
        while self.engine.unfinished and time.perf_counter() - started < TURN_SECONDS:
            done = self.engine.step()
            self.answers |= {row: done.tokens_of(i) for i, row in enumerate(done.rows.tolist())}
        self.seconds += time.perf_counter() - started


def requests_of(rows: Rows, workload: Workload) -> Requests:
    """In the order of their tokens, so that prompts that begin alike are neighbours."""
    rows = sorted(rows)
    lengths, index = np.unique([new for _, new in rows], return_inverse=True)
    requests = Requests.of([prompt for prompt, _ in rows], sampling_of(workload), seeds=range(len(rows)))
    params = SamplingTable.of([replace(requests.params[0], max_tokens=int(length)) for length in lengths])
    return replace(requests, params=params, param_index=index.astype(np.int32))


def side_by_side(engines: dict[str, Engine], requests: Requests) -> dict[str, Runner]:
    """Run them all to the end."""
    runners = {name: Runner(engine) for name, engine in engines.items()}
    for runner in runners.values():
        runner.engine.add(requests)
    while waiting := [runner for runner in runners.values() if runner.engine.unfinished]:
        min(waiting, key=lambda runner: runner.seconds).go_on()
    return runners


@dataclass(frozen=True)
class Run:
    """What is kept of an engine that is done."""

    seconds: float
    stats: EngineStats


def measure(workload: Workload, model: Path, draft: Path | None) -> dict[str, Run]:
    """All ways of one workload. `SystemExit` where their answers differ."""
    requests = requests_of(workload.rows(Text()), workload)
    new = requests.number("max_tokens")
    longest = int((np.diff(requests.offsets) + new).max())
    places = min(workload.max_num_seqs, len(requests))
    config = EngineConfig(
        model,
        quantization="w8a8-int8",
        max_model_len=longest,
        max_num_seqs=workload.max_num_seqs,
        expected_batch=places,
        kv_cache_tokens=places * longest,
        kv_cache_memory_bytes=workload.kv_cache_memory_bytes,
        random_weights=model != TARGET,
    )
    tokenizer = Tokenizer.load(TARGET)
    ways = {OFF: Speculation("off"), **fixed_drafters(draft), AUTO: Speculation("auto", model=draft)}
    plain = replace(config, speculation=ways[OFF], prefix_sharing=False, learned_admission=False)
    configs = {PLAIN: plain} | {name: replace(config, speculation=way) for name, way in ways.items()}
    runners = side_by_side({name: own_engine(config, tokenizer) for name, config in configs.items()}, requests)
    for name, runner in runners.items():
        if runner.answers != runners[PLAIN].answers:
            raise SystemExit(f"{workload.name}: {name} gives other answers than {PLAIN}")
    return {name: Run(runner.seconds, runner.engine.stats()) for name, runner in runners.items()}


def table(runs: list[dict[str, Run]]) -> list[str]:
    """In Markdown: seconds, and beside those of the plain engine and of no drafts in the same run."""
    lines = [
        "| engine | seconds | spread | plain / this | no drafts / this | spread | steps | drafts right | preempted |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in runs[0]:
        seconds = [run[name].seconds for run in runs]
        whole, ratios = ([run[base].seconds / run[name].seconds for run in runs] for base in (PLAIN, OFF))
        stats = runs[-1][name].stats
        lines.append(
            f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} | "
            f"{statistics.median(whole):.2f} | {statistics.median(ratios):.3f} | "
            f"{min(ratios):.3f} to {max(ratios):.3f} | {stats.steps} | {stats.accepted:,} of {stats.drafted:,} | "
            f"{stats.preemptions} |"
        )
    return lines


def summary(runs: list[dict[str, Run]]) -> str:
    """What the gate made of it."""
    seconds = {name: statistics.median(run[name].seconds for run in runs) for name in runs[0]}
    best = min((name for name in seconds if name not in (PLAIN, AUTO)), key=seconds.__getitem__)
    shares = [run[best].seconds / run[AUTO].seconds for run in runs]
    spread = f" ({min(shares):.1%} to {max(shares):.1%})" if len(shares) > 1 else ""
    return (
        f"The best of the others is {best}; auto has {statistics.median(shares):.1%} of its speed{spread}, run by run."
    )


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each workload.")] = 3,
    only: Annotated[str, typer.Option(help="Workloads, with commas between: MODEL/NAME. Results of others stay.")] = "",
    output: Annotated[Path, typer.Option(help="Written with .json and .md.")] = RESULTS / "drafts",
) -> None:
    """Measure each workload, and write one page."""
    sections = Sections(output, "What drafts are worth", ABOUT)
    for label, model, draft, workload in jobs(only):
        ran = "; ".join(conditions().values())
        runs = []
        for _ in range(repeats):
            runs.append(measure(workload, model, draft))
            typer.echo(f"{label}: " + ", ".join(f"{n} {r.seconds:.2f} s" for n, r in runs[-1].items()), err=True)
        sections.put(
            label,
            f"{workload.about}. {repeats} runs; {ran}.",
            [*table(runs), "", summary(runs)],
            seconds={name: [run[name].seconds for run in runs] for name in runs[0]},
        )
    typer.echo(sections.text())


if __name__ == "__main__":
    typer.run(main)
