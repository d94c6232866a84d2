"""How long the steps of models with states and with experts are predicted to take, beside what they take.

    python benchmarks/step_prediction.py [--write]

Measures the device as `batchinfer doctor --calibrate` does, then runs jobs of random weights in the same process: in
the shapes of Qwen3.5-0.8B (gated DeltaNets), LFM2-700M (short convolutions), a few layers of Qwen3-30B-A3B (experts),
and of Llama with 852M parameters for comparison. Of each job the processor time of its steps is compared with the cost
model's prediction for the very same steps. All is on one core and in processor time, so that what else the machine does
counts little. `--write` puts the page into benchmarks/results.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conditions import conditions

from batchinfer.cost import calibrate
from batchinfer.cost.calibrate import _greedy, _NoText, _TimedEngine, _work
from batchinfer.cost.step_cost import PRODUCTS, DeviceCost, Work
from batchinfer.engine.config import EngineConfig, Speculation
from batchinfer.engine.request import Requests
from batchinfer.host import allocator
from batchinfer.host.own_process import own_process

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "step_prediction.md"
BEGUN, TURNS = 1, 2  # runs of each job: the first is not counted
COMMON = {"vocab_size": 16384, "max_position_embeddings": 4096, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3.5-0.8B, 8 of 24 layers": COMMON
    | {
        "model_type": "qwen3_5_text", "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16,
        "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    },
    "LFM2-700M, 6 of 16 layers": COMMON
    | {
        "model_type": "lfm2", "hidden_size": 1536, "intermediate_size": 10240, "num_hidden_layers": 6,
        "num_attention_heads": 24, "num_key_value_heads": 8, "full_attn_idxs": [2, 5], "conv_L_cache": 3,
    },
    "Llama, 852M, 4 of 16 layers": COMMON
    | {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    },
    "Qwen3-30B-A3B, 2 of 48 layers": COMMON
    | {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "num_hidden_layers": 2,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    },
}  # fmt: skip
JOBS = {"12 prompts of 200, 4 new tokens": ([200] * 12, 4), "16 prompts of 20, 24 new tokens": ([20] * 16, 24)}
KINDS = {"bfloat16": "none", "w8a8-int8": "w8a8-int8"}


def seconds_of(shape: dict[str, Any], kind: str, cost: DeviceCost) -> dict[str, list[tuple[float, float]]]:
    """Return, by job, (seconds that its steps took, seconds that were predicted for them) of each run."""
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="batchinfer-bench-") as name:
        (Path(name) / "config.json").write_text(json.dumps(shape))
        config = EngineConfig(
            Path(name), quantization=KINDS[kind], max_model_len=512, max_num_seqs=16, kv_cache_tokens=8192,
            random_weights=True, speculation=Speculation("off"), prefix_sharing=False,
        )  # fmt: skip
        engine = _TimedEngine(config, _NoText())
    model, cached = engine.runner.decoder.config, str(engine.runner.kv_dtype).removeprefix("torch.")
    rng = np.random.default_rng(0)
    for label, (lengths, new) in JOBS.items():
        for turn in range(BEGUN + TURNS):
            engine.add(Requests.of([rng.integers(2, 16000, n).tolist() for n in lengths], _greedy(new)))
            taken, work = 0.0, []
            while engine.unfinished:
                started = time.perf_counter()
                engine.step()
                taken += time.perf_counter() - started
                work.append(_work(engine.batch, engine.table.block_size))
            predicted = float(cost.seconds(kind, Work(*np.array(work).T), model, cached, "greedy").sum())
            if turn >= BEGUN:
                found.setdefault(label, []).append((taken, predicted))
    return found


def main() -> None:
    """Measure the device, run the jobs, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    ran = conditions()
    own_process()
    allocator.keep_freed_memory()  # as in `doctor`, and as in an engine that has loaded its model
    time.perf_counter = time.process_time  # which the engine and the measuring of the device call
    torch.set_num_threads(1)
    calibrate.PRODUCTS = {kind: PRODUCTS[kind] for kind in KINDS}  # the others take longer
    cost = calibrate.measure("cpu", lambda text: print(text, file=sys.stderr, flush=True))
    lines = [
        "| model | products | job | taken, s (least to most) | predicted, s | off |",
        "|---|---|---|---:|---:|---:|",
    ]
    for name, shape in SHAPES.items():
        for kind in KINDS:
            for label, runs in seconds_of(shape, kind, cost).items():
                taken, predicted = (statistics.median(column) for column in zip(*runs, strict=True))
                spread = f"{taken:.2f} ({min(run[0] for run in runs):.2f} to {max(run[0] for run in runs):.2f})"
                off = f"{100 * (predicted / taken - 1):+.0f} %"
                lines.append(f"| {name} | {kind} | {label} | {spread} | {predicted:.2f} | {off} |")
                print(lines[-1], file=sys.stderr, flush=True)
    errors = ", ".join(f"{name} {100 * step.error:.0f} %" for name, step in cost.steps.items())
    page = (
        "# Steps of models with states and with experts, predicted and taken\n\nPrinted by `python "
        "benchmarks/step_prediction.py`: random weights; the cost model's prediction for the very steps that ran, and "
        f"their processor time on one core, medians of {TURNS} runs. The machine also did other work. Median error of "
        f"the steps that the constants were fitted to: {errors}. {', '.join(ran.values())}.\n\n" + "\n".join(lines)
    )
    print(page)
    if args.write:
        RESULT.write_text(page + "\n")


if __name__ == "__main__":
    main()
