"""batchinfer, through its own `bench` command, in the environment that runs this."""

import json
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from checkpoints import checkpoint
from contender import Contender
from environment import run
from workload import SHAPE_DIR, Rates, Workload

from batchinfer import __version__
from batchinfer.kernels.cpu_library import cpu_path

NAME = "batchinfer"
# The peers quantize the output head too; the plain scheme leaves it in floating point.
BEST = ("w8a8-int8+head", "w4a8+head")
QUANTIZATIONS = (*BEST, "w8a8-int8")


def prepare() -> str:
    """Write the checkpoint of 4-bit weights where it is missing; return the versions used."""
    checkpoint("w4a8")
    return f"batchinfer {__version__}, torch {version('torch')}, kernels {cpu_path()}"


def contenders() -> list[Contender]:
    return [
        Contender(NAME, quantization, partial(_measure, quantization), best=quantization in BEST)
        for quantization in QUANTIZATIONS
    ]


def _measure(quantization: str, workload: Workload) -> Rates:
    program = str(Path(sys.executable).with_name("batchinfer"))
    lengths = ["--num-prompts", str(workload.num_prompts)]
    lengths += ["--input-len", str(workload.input_len), "--output-len", str(workload.output_len)]
    four_bits = quantization.startswith("w4")
    weights = [str(checkpoint("w4a8"))] if four_bits else [str(SHAPE_DIR), "--random-weights"]
    model = ["--model", *weights, "--quantization", quantization, "--device", "cpu"]
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        run([program, "bench", *model, *lengths, "--output-json", str(report)])
        figures = json.loads(report.read_text())
    by_phase = figures["report"]["tokens_per_second"]
    return Rates(by_phase["prefill"], by_phase["decode"], figures["total_tokens_per_second"])
