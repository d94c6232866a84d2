"""What quantization costs the demo model in quality: every method by every scheme, on modules it never saw.

    python benchmarks/quantization.py

Held-out modules of the running Python's standard library, windows of 512 tokens; perplexity, bits per byte and the
distance from the checkpoint in bfloat16. Calibrated methods see 128 pieces of modules that the model was trained on.
Takes most of an hour. Writes `benchmarks/results/quantization.json` and `.md`.
"""

import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.jobs.evaluate import Evaluation, evaluate
from batchinfer.jobs.quantize import CalibrationRows, quantize

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "examples" / "stdlib" / "target"
RESULTS = HERE / "results" / "quantization"
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

    conditions = _conditions()
    rows: list[tuple[str, Evaluation]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        held_out, trained_on = folder / "held-out.parquet", folder / "trained-on.parquet"
        for path, which in ((held_out, True), (trained_on, False)):
            pq.write_table(pa.table({"text": [m.text for m in modules() if m.held_out == which]}), path)
        calibration = CalibrationRows(trained_on)

        def measure(label: str, model: Path, quantization: str = "auto") -> None:
            rows.append((label, evaluate(str(model), str(MODEL), held_out, "text", quantization, 512, None)))
            print(f"{label}: perplexity {rows[-1][1].perplexity:.4f}", file=sys.stderr, flush=True)

        measure("bfloat16, the reference", MODEL)
        measure("w8a8-int8 while loading", MODEL, "w8a8-int8")
        for scheme, group_size, method, rotate in checkpoints():
            output = folder / f"{scheme}-{group_size}-{method}-{rotate}"
            made = quantize(str(MODEL), None, output, scheme, method, group_size, calibration, rotate)
            size = f"groups of {made.group_size}" if made.group_size else "whole channels"
            measure(f"{scheme}, {size}, {made.method}", output)
    figures = [
        {"label": label, **asdict(row), "model": MODEL.name, "reference": MODEL.name, "data": "held-out modules"}
        for label, row in rows
    ]
    RESULTS.with_suffix(".json").write_text(json.dumps({**conditions, "rows": figures}, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text(_page(rows, conditions))
    print(RESULTS.with_suffix(".md").read_text())


def _conditions() -> dict[str, str]:
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, cwd=HERE, capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or "not committed",
        "versions": f"batchinfer {version('batchinfer')}, torch {version('torch')}, Python {platform.python_version()}",
    }


def _page(rows: list[tuple[str, Evaluation]], conditions: dict[str, str]) -> str:
    first = rows[0][1]
    lines = [
        "# What quantization costs the demo model",
        "",
        f"{first.rows} held-out modules of the standard library, {first.tokens:,} tokens predicted, {first.windows:,} "
        f"windows of {first.context} tokens without overlap. {conditions['versions']}; commit {conditions['commit']}, "
        f"{conditions['date']}.",
        "",
        "| | perplexity | above the reference | bits per byte | KL divergence, nats | top-1 agreement |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for label, row in rows:
        above = 100 * (row.perplexity / first.perplexity - 1)
        agreement = 100 * (row.top1_agreement or 0.0)
        lines.append(
            f"| {label} | {row.perplexity:.4f} | {above:+.2f} % | {row.bits_per_byte:.4f} | {row.divergence:.6f} | "
            f"{agreement:.2f} % |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
