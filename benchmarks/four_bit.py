"""Which product suits a checkpoint of 4-bit weights, by the rows that run side by side, on the 852M shape.

    python benchmarks/four_bit.py [--repeats N]

Writes a checkpoint of random weights and quantizes it to w4a16, groups of 128. Each path then loads the whole engine,
in a process of its own and in turns with the others, and answers 1, 4, 6, 8, 16 and 64 prompts side by side. Writes
`benchmarks/results/four_bit.json` and `.md`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from conditions import conditions
from random_checkpoint import write_random_checkpoint

HERE = Path(__file__).resolve().parent
SHAPE = HERE / "shapes" / "llama-852m" / "config.json"
RESULTS = HERE / "results" / "four_bit"
ROWS = (1, 4, 6, 8, 16, 64)
PROMPT, NEW = 32, 24
# Path -> the checkpoint it reads and its settings. `expected_batch` is what chooses between the first two in a job.
PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4pack": ("four-bit", {"expected_batch": 1}),
    "expanded to bfloat16": ("four-bit", {"expected_batch": 64}),
    "w4a8": ("four-bit", {"quantization": "w4a8"}),
    "w8a8-int8, of bfloat16 weights": ("plain", {"quantization": "w8a8-int8"}),
}


def main() -> None:
    """Make the checkpoints, run the paths in turns, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", nargs=2, metavar=("MODEL", "SETTINGS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run_engine(Path(args.run[0]), json.loads(args.run[1]))))
        return
    ran = conditions()
    runs: dict[str, list[dict[str, Any]]] = {path: [] for path in PATHS}
    with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as name:
        folder = Path(name)
        write_random_checkpoint(SHAPE, folder / "plain")
        program = Path(sys.executable).with_name("batchinfer")
        command = [program, "quantize", folder / "plain", "-o", folder / "four-bit", "--scheme", "w4a16"]
        subprocess.run([*command, "--method", "rtn"], check=True, stdout=subprocess.DEVNULL)
        for turn in range(args.repeats):
            for path, (model, settings) in PATHS.items():
                command = [sys.executable, __file__, "--run", folder / model, json.dumps(settings)]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                runs[path].append(json.loads(out))
                print(f"turn {turn + 1}, {path}: {runs[path][-1]['decode']}", file=sys.stderr, flush=True)
    RESULTS.with_suffix(".json").write_text(
        json.dumps({**ran, "repeats": args.repeats, "paths": runs}, indent=2) + "\n"
    )
    RESULTS.with_suffix(".md").write_text(_page(runs, ran, args.repeats))
    print(RESULTS.with_suffix(".md").read_text())


def run_engine(model: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """One engine: for each number of rows, tokens a second of prompts and of steps in which all rows decode."""
    import numpy as np

    from batchinfer.engine.config import EngineConfig
    from batchinfer.engine.own_engine import own_engine
    from batchinfer.engine.request import Requests
    from batchinfer.engine.sampling_params import SamplingParams
    from batchinfer.text.tokenizer import Tokenizer

    class Numbers(Tokenizer):
        def __init__(self) -> None:
            self.vocab_size, self.eos_ids = 32_000, (2,)

    most = PROMPT + NEW
    pool = max(ROWS) * -(-most // 32) * 32  # whole blocks for each row, or they would not all run side by side
    config = EngineConfig(model, dtype="bfloat16", max_model_len=most, kv_cache_tokens=pool, **settings)
    engine = own_engine(config, Numbers())
    rng, params = np.random.default_rng(0), SamplingParams(max_tokens=NEW, ignore_eos=True)

    def answer(rows: int) -> tuple[float, float]:
        """(prompt, new) tokens a second."""
        engine.add(Requests.of(rng.integers(3, 32_000, (rows, PROMPT)).tolist(), params))
        began, steps = engine.stats().prefill_seconds, []
        while engine.unfinished:
            started, prompts = time.perf_counter(), engine.stats().prompt_tokens
            engine.step()
            if engine.stats().prompt_tokens == prompts:
                steps.append(time.perf_counter() - started)
        assert len(steps) == NEW - 1, f"{rows} rows did not decode side by side"
        return rows * PROMPT / (engine.stats().prefill_seconds - began), rows / statistics.median(steps)

    answer(8)  # warm
    rates = {rows: answer(rows) for rows in ROWS}
    stats = engine.stats()
    return {
        "prompts": {rows: round(rate[0], 2) for rows, rate in rates.items()},
        "decode": {rows: round(rate[1], 2) for rows, rate in rates.items()},
        "weight_bytes": stats.weight_bytes,
        "peak_memory_bytes": stats.peak_memory_bytes,
        "load_seconds": round(stats.load_seconds, 2),
        "kernels": stats.kernels,
        "notes": stats.notes,
        "device": stats.device,
    }


def _page(runs: dict[str, list[dict[str, Any]]], ran: dict[str, str], repeats: int) -> str:
    lines = [
        "# Paths of a checkpoint with 4-bit weights",
        "",
        f"The 852M shape, random weights, w4a16 in groups of 128; {PROMPT} prompt tokens and {NEW} new ones a row; the "
        f"head in bfloat16. Medians of {repeats} turns, (least to most). {', '.join(ran.values())}.",
        "",
    ]
    titles = {"decode": "New tokens a second", "prompts": "Prompt tokens a second"}
    for figure, title in titles.items():
        lines += [f"{title}, by rows side by side:", "", "| | " + " | ".join(map(str, ROWS)) + " |"]
        lines += ["|---|" + "---:|" * len(ROWS)]
        for path, turns in runs.items():
            cells = [_spread([turn[figure][str(rows)] for turn in turns]) for rows in ROWS]
            lines.append(f"| {path} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["| | weights, MB | peak memory of the process, MB | loading, s |", "|---|---:|---:|---:|"]
    for path, turns in runs.items():
        memory = [statistics.median(turn[key] for turn in turns) / 1e6 for key in ("weight_bytes", "peak_memory_bytes")]
        seconds = _spread([turn["load_seconds"] for turn in turns])
        lines.append(f"| {path} | {memory[0]:,.0f} | {memory[1]:,.0f} | {seconds} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
