"""Measure batchinfer beside its peers on a CPU, in turns, and write one page: `python benchmarks/peers/run.py`.

What a peer needs is installed, built and exported first, into an environment of its own. Every run is a process of its
own; model load and warm-up are not counted. The page and all figures so far are written after every run. An engine that
does not run on this machine, or fails, is named on the page with the reason, and the others go on.
"""

import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.append(str(Path(__file__).resolve().parents[1]))

import llama_cpp
import openvino_int8
import ours
import vllm_w8a8
from conditions import conditions
from contender import Contender
from environment import Failed, run
from table import Row, page
from workload import Rates, Workload

HERE = Path(__file__).resolve().parent
ENGINES = {"batchinfer": ours, "openvino": openvino_int8, "llama.cpp": llama_cpp, "vllm": vllm_w8a8}
WORKLOADS = "64x64x24,16x512x64,4x64x64,1x64x64"


def main(
    engines: Annotated[str, typer.Option(help="Engines to measure, with commas between.")] = ",".join(ENGINES),
    workloads: Annotated[str, typer.Option(help="Rows x prompt tokens x new tokens of each.")] = WORKLOADS,
    turns: Annotated[int, typer.Option(min=1, help="Runs of each engine, setting and workload.")] = 5,
    all_settings: Annotated[bool, typer.Option("--all-settings", help="Also those that are seldom the best.")] = False,
    output: Annotated[Path, typer.Option(help="Written with .json and .md.")] = HERE.parent / "results" / "peers",
) -> None:
    """Measure batchinfer beside its peers and write one page."""
    chosen = engines.split(",")
    if unknown := set(chosen) - set(ENGINES):
        raise typer.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(ENGINES)}", param_hint="--engines")
    try:
        wanted = [Workload.parse(text) for text in workloads.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{workloads}: write {WORKLOADS}, or some of them", param_hint="--workloads") from None
    race = Race(turns, output)
    race.run([c for name in chosen for c in race.prepare(name) if all_settings or c.best], wanted)
    typer.echo(race.page())


class Race:
    """The runs so far, and the conditions and failures that belong beside them on the page."""

    def __init__(self, turns: int, output: Path) -> None:
        self._turns, self._output = turns, output
        self._rates: dict[tuple[Workload, Contender], list[Rates]] = {}
        self._conditions: dict[str, Any] = {
            **conditions(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
            "load_average": os.getloadavg()[0],
            "turns": turns,
            "progress": "no turn is complete",
            "peers": [],
            "failures": [],
        }
        output.parent.mkdir(parents=True, exist_ok=True)

    def prepare(self, name: str) -> list[Contender]:
        """Make an engine ready; return its contenders, none where it does not run here."""
        try:
            self._conditions["peers"].append(ENGINES[name].prepare())
        except Failed as failure:
            self._note(name, failure)
            return []
        return ENGINES[name].contenders()

    def run(self, contenders: list[Contender], workloads: list[Workload]) -> None:
        """A B C A B C, so that a slow minute of the machine falls on all alike."""
        ceiling = run([sys.executable, str(HERE / "ceiling.py")])
        self._conditions["ceiling_operations_per_second"] = float(ceiling)
        failed = set()
        for turn in range(self._turns):
            for workload in workloads:
                for contender in contenders:
                    what = f"{workload}, {contender.engine}, {contender.setting}"
                    if (workload, contender) in failed:
                        continue
                    try:
                        rates = contender.measure(workload)
                    except Failed as failure:
                        failed.add((workload, contender))
                        self._note(what, failure)
                        continue
                    self._rates.setdefault((workload, contender), []).append(rates)
                    typer.echo(f"turn {turn + 1} of {self._turns}: {what}: {rates.total:.0f} tokens/s", err=True)
                    self._write()
            self._conditions["progress"] = f"{turn + 1} of {self._turns} turns complete"
        self._write()

    def page(self) -> str:
        """Everything so far as Markdown."""
        return page(self._rows(), ours.NAME, self._conditions)

    def _rows(self) -> list[Row]:
        return [Row(work, of.engine, of.setting, tuple(rates)) for (work, of), rates in self._rates.items()]

    def _note(self, what: str, failure: Failed) -> None:
        typer.echo(f"{what}: {failure}", err=True)
        self._conditions["failures"].append(f"{what}: {failure.reason}")

    def _write(self) -> None:
        results = self._conditions | {"rows": [asdict(row) for row in self._rows()]}
        self._output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        self._output.with_suffix(".md").write_text(self.page())


if __name__ == "__main__":
    typer.run(main)
