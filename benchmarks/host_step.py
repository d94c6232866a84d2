"""How long the host is at work for a decoding step on a GPU; needs none.

    .venv/bin/python benchmarks/host_step.py [--rows 1,256] [--steps N] [--profile]
    .venv/bin/python benchmarks/host_step.py --beside OTHER/.venv/bin/python [--runs N]

A GPU that has computed a step before the host has made the next one waits for it. Here the engine schedules, plans,
pads and ends its steps as on a GPU with 132 multiprocessors, for the heads of Llama-3-8B; in the place of the model
stands a function that returns tokens at once. Contexts are ragged, from 500 to 1,500 tokens. Prints the milliseconds of
processor time a decoding step, greedy and sampled. `--beside` runs this file in turns with the Python of another
checkout's environment, so that a slow minute falls on both, and prints medians and the spread of the ratio.
"""

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "BATCHINFER_KERNELS": "triton", "TRITON_INTERPRET": "1"}

import numpy as np
import torch

from batchinfer.engine.config import EngineConfig, Speculation
from batchinfer.engine.engine import Engine
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.kernels import backend_triton
from batchinfer.kernels.gpu import Gpu
from batchinfer.models.batch import Batch
from batchinfer.text.tokenizer import Tokenizer

H200 = Gpu("H200", (9, 0), 132, 227 << 10)
ROWS = (1, 16, 64, 256, 1024)
WAYS = {"greedy": 0.0, "sampled": 0.8}
CONTEXTS = (500, 1500)
WARM = 40  # steps before those that are timed, in which steps of this shape are recorded
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


class Ids(Tokenizer):
    """Says how many tokens there are; no text is made of them."""

    def __init__(self) -> None:
        self.vocab_size, self.eos_ids = int(SHAPE["vocab_size"]), (1,)


def decoding_engine(folder: Path, rows: int, temperature: float, steps: int) -> Engine:
    """An engine whose `rows` sequences all decode."""
    length = CONTEXTS[1] + WARM + 2 * steps + 100
    config = EngineConfig(
        folder,
        max_model_len=length,
        max_num_seqs=rows,
        max_num_batched_tokens=8192,
        kv_cache_tokens=rows * length,
        kv_cache_memory_bytes=None,
        random_weights=True,
        speculation=Speculation("off"),
        prefix_sharing=False,
    )
    engine = Engine(config, Ids())
    tokens, finite = torch.full((rows,), 7), torch.ones(rows, dtype=torch.bool)

    def compute(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, None]:
        count = len(batch.places)
        if count > len(tokens):
            return torch.full((count,), 7), torch.ones(count, dtype=torch.bool), None
        return tokens[:count], finite[:count], None

    engine.runner.steps.compute = compute
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 1000, length).tolist() for length in rng.integers(*CONTEXTS, rows)]
    params = SamplingParams(max_tokens=length - CONTEXTS[1], ignore_eos=True, temperature=temperature)
    engine.add(Requests.of(prompts, params, seeds=range(rows)))
    table = engine.table
    while table.active.sum() < rows or (table.computed < table.prompt_length).any():
        engine.step()
    for _ in range(WARM):
        engine.step()
    return engine


def milliseconds(folder: Path, rows: int, temperature: float, steps: int, profile: bool) -> float:
    """Processor time of a step, the mean of `steps`."""
    engine = decoding_engine(folder, rows, temperature, steps)
    profiler = cProfile.Profile(time.process_time)
    if profile:
        profiler.enable()
    started = time.process_time()
    for _ in range(steps):
        engine.step()
    seconds = time.process_time() - started
    if profile:
        profiler.disable()
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(30)
    return 1e3 * seconds / steps


def measure(rows: list[int], steps: int, profile: bool) -> dict[str, float]:
    """Milliseconds a step, by case."""
    backend_triton.gpu_of = lambda device: H200
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as name:
        (Path(name) / "config.json").write_text(json.dumps(SHAPE))
        return {
            f"{count:>5} rows, {way}": milliseconds(Path(name), count, temperature, steps, profile)
            for count in rows
            for way, temperature in WAYS.items()
        }


def beside(other: str, args: argparse.Namespace) -> None:
    """Run both in turns and print what each took."""
    options = ["--rows", args.rows, "--steps", str(args.steps), "--json"]
    runs: dict[str, list[tuple[float, float]]] = {}
    for _ in range(args.runs):
        ours, theirs = (
            json.loads(subprocess.run([python, __file__, *options], check=True, capture_output=True, text=True).stdout)
            for python in (sys.executable, other)
        )
        for case in ours:
            runs.setdefault(case, []).append((ours[case], theirs[case]))
    print("milliseconds a step      this    other   ratio (least to most)")
    for case, pairs in runs.items():
        ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = sorted(a / b for a, b in pairs)
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{case:<22}{ours:>7.3f}  {theirs:>7.3f}   {spread}")


def main() -> None:
    """Measure, alone or beside another checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--beside", metavar="PYTHON")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.beside:
        return beside(args.beside, args)
    figures = measure([int(count) for count in args.rows.split(",")], args.steps, args.profile)
    if args.json:
        return print(json.dumps(figures))
    for case, figure in figures.items():
        print(f"{case:<22}{figure:>7.3f} ms a step")


if __name__ == "__main__":
    main()
