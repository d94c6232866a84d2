"""Measure batchinfer beside its peers, in turns, and write one table: `python benchmarks/peers/run.py`.

What a peer needs is installed, built and exported first, into an environment of its own. Every run is a process of its
own; model load and warm-up are not counted.
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import llama_cpp
import openvino_int8
import ours
import typer
from contender import Contender
from environment import run
from table import Row, page
from workload import INPUT_LEN, NUM_PROMPTS, OUTPUT_LEN, SHAPE_DIR, Rates

HERE = Path(__file__).resolve().parent
ENGINES = {"batchinfer": ours, "llama.cpp": llama_cpp, "openvino": openvino_int8}


def main(
    engines: Annotated[str, typer.Option(help="Engines to measure, with commas between.")] = ",".join(ENGINES),
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each engine and setting.")] = 5,
    output: Annotated[Path, typer.Option(help="Written with .json and .md.")] = HERE.parent / "results" / "peers",
) -> None:
    """Measure batchinfer beside its peers and write one table."""
    chosen = engines.split(",")
    if unknown := set(chosen) - set(ENGINES):
        raise typer.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(ENGINES)}", param_hint="--engines")

    versions = [ENGINES[name].prepare() for name in chosen]
    conditions = _conditions(versions)
    conditions["ceiling_operations_per_second"] = float(run([sys.executable, str(HERE / "ceiling.py")]))
    output.parent.mkdir(parents=True, exist_ok=True)
    report = ""
    for rows in _measure_in_turns([contender for name in chosen for contender in ENGINES[name].contenders()], repeats):
        report = page(rows, next((row for row in rows if row.engine == ours.NAME), None), conditions)
        results = conditions | {"rows": [asdict(row) for row in rows]}
        output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        output.with_suffix(".md").write_text(report)
    typer.echo(report)


def _measure_in_turns(contenders: list[Contender], repeats: int) -> Iterator[list[Row]]:
    """A B C A B C, so that a slow minute of the machine falls on all alike; all rows so far after each turn."""
    runs: list[list[Rates]] = [[] for _ in contenders]
    for repeat in range(repeats):
        for contender, rates in zip(contenders, runs, strict=True):
            rates.append(contender.measure())
            what = f"{contender.engine}, {contender.setting}"
            typer.echo(f"run {repeat + 1} of {repeats}: {what}: {rates[-1].total:.0f} tokens/s", err=True)
        yield [
            Row(contender.engine, contender.setting, tuple(rates))
            for contender, rates in zip(contenders, runs, strict=True)
        ]


def _conditions(versions: list[str]) -> dict[str, Any]:
    """What a reader needs to judge the numbers, or to take them again."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, cwd=HERE, capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or "not committed",
        "machine": {
            "cpu": cpu[1] if cpu else platform.machine(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
            "load_average": os.getloadavg()[0],
        },
        "versions": versions,
        "shape": SHAPE_DIR.name,
        "workload": {"num_prompts": NUM_PROMPTS, "input_len": INPUT_LEN, "output_len": OUTPUT_LEN},
    }


if __name__ == "__main__":
    typer.run(main)
