"""How long jobs were predicted to take, and how long they took.

    make demo/prompts.parquet && python benchmarks/prediction.py [--repeats N] [--measure]

Four jobs, each in a process of its own, by the command line: the demo, the 852M shape, long prompts with short answers
in bfloat16, and few rows with long answers. What the report says of each run is compared: the time of generating, the
prediction before the run, and the one for the lengths that came, which is the cost model alone. `--measure` has
`batchinfer doctor --calibrate` measure the device first. Nothing else may run on the machine. Writes
`benchmarks/results/prediction.json` and `.md`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from conditions import conditions
from random_checkpoint import write_random_checkpoint

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TARGET = ROOT / "examples" / "stdlib" / "target"
DEMO_JOB = ROOT / "examples" / "stdlib" / "job.toml"
DEMO_PROMPTS = ROOT / "demo" / "prompts.parquet"
SHAPE = HERE / "shapes" / "llama-852m" / "config.json"
RESULTS = HERE / "results" / "prediction"
COMMAND = [sys.executable, "-P", "-m", "batchinfer"]
WITHIN = 0.2  # of the result: what a prediction is for


def main() -> None:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--measure", action="store_true")
    args = parser.parse_args()
    ran = conditions()
    if args.measure:
        subprocess.run([*COMMAND, "doctor", "--calibrate"], check=True)
    jobs = []
    with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as name:
        folder = Path(name)
        for label, arguments in workloads(folder).items():
            runs = [run_once(folder / "out.parquet", arguments) for _ in range(args.repeats)]
            jobs.append({"job": label, "runs": runs, **compared(runs)})
            print(line(jobs[-1]), flush=True)
    RESULTS.with_suffix(".json").write_text(json.dumps({**ran, "jobs": jobs}, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text(page(jobs, ran))


def workloads(folder: Path) -> dict[str, list[str]]:
    """By name, what `batchinfer run` is given; the tables and the checkpoint of noise are made in `folder`."""
    demo = pq.read_table(DEMO_PROMPTS).column("prompt").to_pylist()
    by_length = sorted(demo, key=len)
    tables = {"long": by_length[-200:], "few": by_length[len(demo) // 2 :][:4], "middle": by_length[200:264]}
    for name, prompts in tables.items():
        pq.write_table(pa.table({"prompt": prompts}), folder / f"{name}.parquet")
    noise = write_random_checkpoint(SHAPE, folder / "noise")
    target = ["--model", str(TARGET), "--quantization", "none", "--dtype", "bfloat16"]
    few = [str(folder / "few.parquet"), *target, "--ignore-eos", "--max-tokens", "800"]
    eight_bits = ["--quantization", "w8a8-int8", "--ignore-eos", "--max-tokens", "24"]
    return {
        "the demo": ["--config", str(DEMO_JOB)],
        "852M parameters, w8a8-int8": [str(folder / "middle.parquet"), "--model", str(noise), *eight_bits],
        "long prompts, 8 new tokens, bfloat16": [str(folder / "long.parquet"), *target, "--max-tokens", "8"],
        "4 rows, 800 new tokens, bfloat16": [*few, "--speculative-config", "off"],
        "the same with drafts, which are not predicted": few,
    }


def run_once(output: Path, arguments: list[str]) -> dict[str, float]:
    """Seconds of one run, and those that were predicted."""
    command = [*COMMAND, "run", *arguments, "-o", str(output), "--overwrite"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report: dict[str, Any] = json.loads((output.with_suffix(".run") / "report.json").read_text())
    if report["predicted"] is None:
        sys.exit("this device was not measured: run with --measure")
    return {"generate_seconds": report["generate_seconds"], "wall_seconds": report["wall_seconds"]} | report[
        "predicted"
    ]


def compared(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians of the runs, the spread of their times, and how far the predictions are off, as shares of the result."""
    taken = [run["generate_seconds"] for run in runs]
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {
        **middle,
        "spread": (max(taken) - min(taken)) / middle["generate_seconds"],
        "error": middle["seconds"] / middle["generate_seconds"] - 1,
        "error_for_lengths": middle["seconds_for_lengths"] / middle["generate_seconds"] - 1,
    }


def line(job: dict[str, Any]) -> str:
    """A row of the table."""
    cells = (
        job["job"],
        f"{job['generate_seconds']:.1f} s",
        f"{100 * job['spread']:.0f} %",
        f"{job['seconds']:.1f} s ({job['low']:.1f} to {job['high']:.1f})",
        f"{100 * job['error']:+.0f} %",
        f"{job['seconds_for_lengths']:.1f} s",
        f"{100 * job['error_for_lengths']:+.0f} %",
    )
    return f"| {' | '.join(cells)} |"


def page(jobs: list[dict[str, Any]], ran: dict[str, str]) -> str:
    """The results, to be read."""
    near = sum(abs(job["error_for_lengths"]) <= WITHIN for job in jobs)
    lines = [
        "# Predicted and taken",
        "",
        f"{', '.join(ran.values())}. Medians of {len(jobs[0]['runs'])} runs; seconds of generating, without start and "
        f"loading. For the lengths that came, {near} of {len(jobs)} jobs are predicted within {WITHIN:.0%}.",
        "",
        "| job | taken | spread | predicted before | off | for the lengths that came | off |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *map(line, jobs),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
