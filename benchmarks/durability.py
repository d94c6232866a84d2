"""What it costs that nothing is lost: the share of the demo job's wall time that commits and the merge take.

    make demo && python benchmarks/durability.py [--repeats N]

The same job with commits as they are by default, and with one every two seconds. Commits and the merge are timed by the
job itself (`report.json`). Prints a table; writes `benchmarks/results/durability.md`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from conditions import conditions

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"by default": [], "every 2 seconds": ["--commit-seconds", "2"]}
HEAD = ["commits", "parts", "wall, s", "commits, s", "commits, %", "commits, % (least to most)", "merge, %"]


def run_once(folder: Path, flags: list[str]) -> dict[str, Any]:
    """The demo job in a new place: its report, and how many parts it committed."""
    output = folder / "answers.parquet"
    program = Path(sys.executable).with_name("batchinfer")
    job = ["run", "--config", ROOT / "examples" / "stdlib" / "job.toml", "-o", output, "--overwrite"]
    subprocess.run([program, *job, *flags], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report: dict[str, Any] = json.loads((folder / "answers.run" / "report.json").read_text())
    return {**report, "parts": len(list((folder / "answers.run" / "parts").iterdir()))}


def row_of(name: str, runs: list[dict[str, Any]]) -> list[str]:
    """A line of the table."""
    commits = [100 * run["phases"]["commit"] / run["wall_seconds"] for run in runs]
    merges = [100 * run["phases"]["merge"] / run["wall_seconds"] for run in runs]
    return [
        name,
        f"{median(run['parts'] for run in runs):.0f}",
        f"{median(run['wall_seconds'] for run in runs):.1f}",
        f"{median(run['phases']['commit'] for run in runs):.3f}",
        f"{median(commits):.2f}",
        f"{min(commits):.2f} to {max(commits):.2f}",
        f"{median(merges):.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    taken = conditions()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as name:
        for _ in range(args.repeats):
            for setting, flags in SETTINGS.items():
                runs[setting].append(run_once(Path(name), flags))
    lines = [HEAD, ["---"] + ["---:"] * (len(HEAD) - 1), *(row_of(name, found) for name, found in runs.items())]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    print(table)
    of = f"The demo job, median of {args.repeats} runs in turns. {'. '.join(taken.values())}."
    page = f"# What durability costs\n\n{of}\n\n{table}\n"
    (ROOT / "benchmarks" / "results" / "durability.md").write_text(page)


if __name__ == "__main__":
    main()
