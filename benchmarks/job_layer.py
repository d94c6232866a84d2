"""The job layer alone: a million short text rows through an engine that computes nothing.

    python benchmarks/job_layer.py [--rows N] [--repeats N] [--by-row]

Everything but the model runs: reading, tokenizing, planning, the child process, text of the answers, commits, merge.
With `--by-row` each row has sampling params of its own, and no two rows the same. Prints one line a run; writes
`benchmarks/results/job_layer.json`, or `job_layer_by_row.json`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
MODEL = HERE.parent / "examples" / "stdlib" / "target"
WORDS = ("label", "this", "row", "as", "good", "or", "bad", "if", "it", "is", "one")


def write_rows(path: Path, count: int, by_row: bool) -> None:
    """Short prompts, no two alike, in row groups of 100,000; with `by_row`, a temperature each too."""
    params = pa.struct([("temperature", pa.float64())])
    columns = [("id", pa.int64()), ("prompt", pa.string()), *([("sampling_params", params)] if by_row else [])]
    with pq.ParquetWriter(path, pa.schema(columns)) as writer:
        for first in range(0, count, 100_000):
            rows = range(first, min(first + 100_000, count))
            prompts = [f"{WORDS[i % 11]} {i} {WORDS[i % 7]}" for i in rows]
            table = pa.table({"id": list(rows), "prompt": prompts})
            if by_row:
                own = pa.array([{"temperature": 1 + i / count} for i in rows], params)
                table = table.append_column("sampling_params", own)
            writer.write_table(table)


def run_once(folder: Path, by_row: bool) -> dict[str, Any]:
    """One job, in a process of its own, so that its peak memory is its own."""
    code = (
        "import json, sys; from dataclasses import asdict; from pathlib import Path;"
        "from batchinfer.jobs.bench import STUB_ENGINE; from batchinfer.jobs.job import run;"
        "from batchinfer.jobs.spec import JobSpec; from batchinfer.engine.sampling_params import SamplingParams;"
        "spec = JobSpec(inputs=(Path(sys.argv[1]),), output=Path(sys.argv[2]), model=sys.argv[3],"
        "               prompt_column='prompt', sampling=SamplingParams(max_tokens=4), overwrite=True,"
        "               columns=('id', 'prompt'), sampling_params_column=sys.argv[4] or None);"
        "print(json.dumps(asdict(run(spec, STUB_ENGINE))))"
    )
    column = "sampling_params" if by_row else ""
    command = [sys.executable, "-c", code, folder / "in.parquet", folder / "out.parquet", MODEL, column]
    out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    report: dict[str, Any] = json.loads(out)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--by-row", action="store_true")
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as name:
        folder = Path(name)
        write_rows(folder / "in.parquet", args.rows, args.by_row)
        for _ in range(args.repeats):
            report = run_once(folder, args.by_row)
            rate = report["rows"] / report["wall_seconds"]
            megabytes = {process: round(size / 1e6) for process, size in report["peak_memory_bytes"].items()}
            print(f"{rate:,.0f} rows/s, {report['wall_seconds']:.1f} s, peak memory in MB {megabytes}", flush=True)
            kept = (
                "rows",
                "wall_seconds",
                "generate_seconds",
                "phases",
                "peak_memory_bytes",
                "prompt_tokens",
                "versions",
            )
            runs.append({"rows_per_second": rate} | {key: report[key] for key in kept})
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True).stdout
    machine = {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    result = {"rows": args.rows, "commit": commit.strip(), "machine": machine, "runs": runs}
    name = "job_layer_by_row.json" if args.by_row else "job_layer.json"
    (HERE / "results" / name).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
