"""What quantization costs the demo model in quality: every method by every scheme, on modules it never saw.

    python benchmarks/quantization.py

Held-out modules of the running Python's standard library, windows of 512 tokens; perplexity, bits per byte and the
distance from the checkpoint in bfloat16. Calibrated methods see 128 pieces of modules that the model was trained on.
Takes most of an hour. Writes `benchmarks/results/quantization.json` and `.md`.
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from conditions import conditions
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from batchinfer.engine.engine import Engine
from batchinfer.engine.own_engine import own_engine
from batchinfer.jobs.evaluate import config_for_windows, windows_of
from batchinfer.jobs.quantize import CalibrationRows, quantize
from batchinfer.jobs.tables.table import Table
from batchinfer.quality.evaluator import Scores, all_logits
from batchinfer.text.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "examples" / "stdlib" / "target"
RESULTS = HERE / "results" / "quantization"
CONTEXT = 512
Checkpoint = tuple[str, int | None, str, bool]
"""Scheme, group size, method, whether it is rotated first."""


def checkpoints() -> list[Checkpoint]:
    """Every method in the schemes where methods differ, the plainest and the best in the others."""
    made: list[Checkpoint] = []
    for scheme, group_size, scales in (
        ("w4a16", 128, "awq"),
        ("w4a8", 128, "smoothquant"),
        ("w8a8-int8", None, "smoothquant"),
    ):
        made += [(scheme, group_size, method, False) for method in ("rtn", "rtn-mse", "rtn-importance", scales, "gptq")]
        made += [(scheme, group_size, method, True) for method in ("rtn", "gptq")]
    for size in (64, 32, 0):
        made += [("w4a16", size, method, False) for method in ("rtn", "gptq")]
    made += [("w4a16", 0, "gptq", True), ("w4a8", 0, "gptq", False), ("w4a8", 0, "gptq", True)]
    return [*made, ("w8a16", None, "rtn", False), ("w8a8-fp8", None, "rtn", False)]


def main() -> None:
    """Quantize, evaluate, write."""
    sys.path.insert(0, str(MODEL.parent))
    from corpus import modules

    ran = conditions()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        held_out, trained_on = folder / "held-out.parquet", folder / "trained-on.parquet"
        for path, which in ((held_out, True), (trained_on, False)):
            pq.write_table(pa.table({"text": [m.text for m in modules() if m.held_out == which]}), path)
        tokenizer = Tokenizer.load(MODEL)
        engines = {
            "bfloat16, the reference": own_engine(config_for_windows(MODEL, "none", "auto", CONTEXT), tokenizer),
            "w8a8-int8 while loading": own_engine(config_for_windows(MODEL, "w8a8-int8", "auto", CONTEXT), tokenizer),
        }
        for scheme, group_size, method, rotate in tqdm(checkpoints(), unit=" checkpoints"):
            output = folder / f"{scheme}-{group_size}-{method}-{rotate}"
            made = quantize(str(MODEL), None, output, scheme, method, group_size, CalibrationRows(trained_on), rotate)
            size = f"groups of {made.group_size}" if made.group_size else "whole channels"
            engines[f"{scheme}, {size}, {made.method}"] = own_engine(
                config_for_windows(output, "auto", "auto", CONTEXT), tokenizer
            )
        table = Table.open([held_out])
        windows = list(windows_of(table, "text", tokenizer, CONTEXT, table.num_rows, []))
        scores = _scores(engines, windows)
    rows = [{"label": label, **asdict(score), **_figures(score)} for label, score in scores.items()]
    figures = {**ran, "context": CONTEXT, "modules": table.num_rows, "rows": rows}
    RESULTS.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text(_page(scores, ran, table.num_rows))
    print(RESULTS.with_suffix(".md").read_text())


@torch.inference_mode()
def _scores(engines: dict[str, Engine], windows: list[NDArray[np.int32]]) -> dict[str, Scores]:
    """Of each engine beside the first, which computes each window but once."""
    scores = {label: Scores() for label in engines}
    for window in tqdm(windows, unit=" windows"):
        expected: Tensor | None = None
        for label, engine in engines.items():
            logits = all_logits(engine, window)
            expected = logits if expected is None else expected
            scores[label].add(engine.tokenizer, window, logits, expected)
    return scores


def _figures(score: Scores) -> dict[str, float]:
    return {
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "nats_a_token": score.divergence / score.tokens,
        "top1_agreement": score.agreed / score.tokens,
    }


def _page(scores: dict[str, Scores], ran: dict[str, str], rows: int) -> str:
    first = next(iter(scores.values()))
    lines = [
        "# What quantization costs the demo model",
        "",
        f"{rows} held-out modules of the standard library, {first.tokens:,} tokens predicted, {first.windows:,} "
        f"windows of {CONTEXT} tokens without overlap. {', '.join(ran.values())}. One draw of calibration rows.",
        "",
        "| | perplexity | above the reference | bits per byte | KL divergence, nats | top-1 agreement |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for label, score in scores.items():
        above = 100 * (score.perplexity / first.perplexity - 1)
        lines.append(
            f"| {label} | {score.perplexity:.4f} | {above:+.2f} % | {score.bits_per_byte:.4f} | "
            f"{score.divergence / score.tokens:.6f} | {100 * score.agreed / score.tokens:.2f} % |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
