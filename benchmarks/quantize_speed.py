"""How long quantizing the 852M shape takes, and how much memory, by method.

    python benchmarks/quantize_speed.py

Calibrated methods see 128 rows of 512 tokens at most. Weights are noise, which costs the same time as knowledge. Takes
about twenty minutes on two cores. Writes `benchmarks/results/quantize_speed.json` and `.md`.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from conditions import conditions
from random_checkpoint import stored_bytes, write_random_checkpoint

HERE = Path(__file__).resolve().parent
SHAPE = HERE / "shapes" / "llama-852m" / "config.json"
RESULTS = HERE / "results" / "quantize_speed"
RUNS = [("w4a16", "rtn"), ("w4a16", "rtn-mse"), ("w4a16", "gptq")]


def main() -> None:
    """Write the checkpoint, quantize it by each method, write the table."""
    ran = conditions()
    figures: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        model = write_random_checkpoint(SHAPE, Path(name) / "model")
        megabytes = stored_bytes(model) / 1e6
        for scheme, method in RUNS:
            output = Path(name) / f"{scheme}-{method}"
            command = [Path(sys.executable).with_name("batchinfer"), "quantize", model, "-o", output]
            flags = ["--scheme", scheme, "--method", method]
            printed = subprocess.run([*command, *flags], stdout=subprocess.PIPE, text=True, check=True).stdout
            found = {field: _field(printed, field) for field in ("calibration", "size", "time", "peak memory")}
            figures.append({"scheme": scheme, "method": method, **found})
            print(figures[-1], file=sys.stderr, flush=True)
    RESULTS.with_suffix(".json").write_text(json.dumps({**ran, "runs": figures}, indent=2) + "\n")
    lines = [
        "# Quantizing the 852M shape",
        "",
        f"{megabytes:,.0f} MB in bfloat16, weights of noise; one run each. {', '.join(ran.values())}.",
        "",
        "| scheme | method | time | peak memory | size | calibration |",
        "|---|---|---:|---:|---|---|",
    ]
    for row in figures:
        cells = [row[name] for name in ("scheme", "method", "time", "peak memory", "size", "calibration")]
        lines.append(f"| {' | '.join(cells)} |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _field(printed: str, name: str) -> str:
    found = re.search(rf"^{name} +(.+)$", printed, re.MULTILINE)
    assert found, printed
    return found[1]


if __name__ == "__main__":
    main()
