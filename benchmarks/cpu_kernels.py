"""The kernels in C beside torch's operations, on the 852M shape and in attention alone, in turns.

    python benchmarks/cpu_kernels.py [--repeats N] [--write]

Runs each workload (rows x prompt x new tokens, random weights) by `batchinfer bench`, in a process of its own, on each
path in turns; then attention of 64 rows that decode behind 512 positions, on both paths in one process. `--write` puts
the page into `benchmarks/results/cpu_kernels.md`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conditions import conditions

HERE = Path(__file__).resolve().parent
SHAPE = HERE / "shapes" / "llama-852m"
RESULTS = HERE / "results" / "cpu_kernels.md"
WORKLOADS = {
    "64 x 64 x 24": (64, 64, 24, []),
    "16 x 512 x 64": (16, 512, 64, []),
    "16 x 512 x 64, 8-bit keys and values": (16, 512, 64, ["--kv-cache-dtype", "int8"]),
    "4 x 64 x 64": (4, 64, 64, []),
    "1 x 64 x 64": (1, 64, 64, []),
}
ROWS, CONTEXT, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 64, 512, 32, 8, 64, 32


def main() -> None:
    """Run all workloads in turns, and attention; print the page."""
    from batchinfer.kernels.cpu_library import REFERENCE, cpu_path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if (path := cpu_path()) == REFERENCE:
        parser.error("no kernels in C run here")
    ran = conditions()
    lines = []
    for name, workload in WORKLOADS.items():
        runs: dict[str, list[dict[str, Any]]] = {REFERENCE: [], path: []}
        for _ in range(args.repeats):
            for each in runs:
                runs[each].append(run(each, *workload))
                print(f"{name}, {each}: {runs[each][-1]['total_tokens_per_second']:.0f}", file=sys.stderr, flush=True)
        lines.append(row(name, runs[REFERENCE], runs[path]))
    page = f"""# Kernels in C on a CPU

Total tokens a second (prompts and answers, loading excluded) of `w8a8-int8+head` on the 852M shape, random weights:
{"one run each" if args.repeats == 1 else f"median of {args.repeats} runs"} in turns, with the least and the most.

| rows x prompt x new | torch's operations | {path} | ratio | peak memory, ratio |
|---|---:|---:|---:|---:|
{chr(10).join(lines)}

Attention of one layer: {ROWS} rows decode one token each behind {CONTEXT} positions; {HEADS} heads, {KV_HEADS} of
keys, {HEAD_DIM} numbers each. Milliseconds, the best of {5 * args.repeats} calls in turns.

| keys and values | torch's operations | {path} | ratio |
|---|---:|---:|---:|
{chr(10).join(attention_row(kind, path, 5 * args.repeats) for kind in ("float32", "bfloat16", "int8"))}

Printed by `python benchmarks/cpu_kernels.py`. {ran["machine"]}; {ran["versions"]}; {ran["commit"]}; {ran["date"]}.
"""
    print(page)
    if args.write:
        RESULTS.write_text(page)


def run(path: str, rows: int, prompt: int, new: int, flags: list[str]) -> dict[str, Any]:
    """Run a workload by the command line; return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        command = [sys.executable, "-P", "-m", "batchinfer", "bench", "--model", str(SHAPE), "--random-weights"]
        command += ["--quantization", "w8a8-int8+head", "--device", "cpu", "--cpu-path", path]
        command += ["--num-prompts", str(rows), "--input-len", str(prompt), "--output-len", str(new)]
        command += ["--output-json", str(figures), *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        made: dict[str, Any] = json.loads(figures.read_text())
        return made


def row(name: str, reference: list[dict[str, Any]], compiled: list[dict[str, Any]]) -> str:
    """Return a workload's line of the page."""
    speeds = [[run["total_tokens_per_second"] for run in runs] for runs in (reference, compiled)]
    memory = [
        statistics.median(run["report"]["peak_memory_bytes"]["engine"] for run in runs)
        for runs in (reference, compiled)
    ]
    told = [f"{statistics.median(of):.0f} ({min(of):.0f} to {max(of):.0f})" for of in speeds]
    ratio = statistics.median(speeds[1]) / statistics.median(speeds[0])
    return f"| {name} | {told[0]} | {told[1]} | {ratio:.2f} | {memory[1] / memory[0]:.2f} |"


def attention_row(kind: str, path: str, repeats: int) -> str:
    """Time a layer's attention with keys and values of this type on both paths; return its line of the page."""
    import numpy as np
    import torch

    from batchinfer.engine.attention_inputs import TiledInputs, WindowedInputs
    from batchinfer.engine.sequence import SequenceTable
    from batchinfer.kernels.attention_shape import AttentionShape
    from batchinfer.kernels.backend_compiled import CompiledBackend
    from batchinfer.kernels.backend_cpu import CpuBackend
    from batchinfer.kernels.kv_cache import KV_DTYPES, KVCache, cache_rows

    per_row = CONTEXT // BLOCK
    table = SequenceTable(ROWS, CONTEXT, BLOCK)
    table.blocks[:, :per_row] = 1 + np.arange(ROWS * per_row).reshape(ROWS, per_row)
    shape = AttentionShape(None, HEADS, KV_HEADS, HEAD_DIM)
    query = torch.randn(ROWS, HEADS, HEAD_DIM)
    slots = torch.arange((ROWS * per_row + 1) * BLOCK)
    stored = torch.randn(2, len(slots), KV_HEADS, HEAD_DIM)
    calls: list[Callable[[], object]] = []
    for backend, inputs in ((CpuBackend(), TiledInputs([shape])), (CompiledBackend(path), WindowedInputs([shape]))):
        cache = KVCache(
            *(ROWS * per_row + 1, KV_HEADS, BLOCK, HEAD_DIM, KV_DTYPES[kind]), keys_by_column=backend.keys_by_column
        )
        cache.store(*stored, cache_rows(slots, KV_HEADS, BLOCK))
        batch = inputs(table, [], np.arange(ROWS), np.full(ROWS, CONTEXT - 1))[shape]
        calls.append(lambda b=backend, c=cache, of=batch: b.attention(query, c, of, HEAD_DIM**-0.5, None, None))
    best = [float("inf")] * 2
    for _ in range(repeats):
        for i, call in enumerate(calls):
            began = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - began)
    return f"| {kind} | {1e3 * best[0]:.1f} | {1e3 * best[1]:.1f} | {best[0] / best[1]:.1f} |"


if __name__ == "__main__":
    main()
