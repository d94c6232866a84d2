"""batchinfer, through its own `bench` command, in the environment that runs this."""

import json
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from contender import Contender
from environment import run
from workload import INPUT_LEN, NUM_PROMPTS, OUTPUT_LEN, SHAPE_DIR, Rates

from batchinfer import __version__

NAME = "batchinfer"
# The peers quantize the output head too; the plain scheme leaves it in floating point.
QUANTIZATIONS = ("w8a8-int8", "w8a8-int8+head")


def prepare() -> str:
    return f"batchinfer {__version__}, torch {version('torch')}"


def contenders() -> list[Contender]:
    return [Contender(NAME, quantization, partial(_measure, quantization)) for quantization in QUANTIZATIONS]


def _measure(quantization: str) -> Rates:
    program = Path(sys.executable).with_name("batchinfer")
    lengths = ["--num-prompts", str(NUM_PROMPTS), "--input-len", str(INPUT_LEN), "--output-len", str(OUTPUT_LEN)]
    model = ["--model", str(SHAPE_DIR), "--random-weights", "--quantization", quantization]
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        run([str(program), "bench", *model, *lengths, "--output-json", str(report)])
        figures = json.loads(report.read_text())
    by_phase = figures["report"]["tokens_per_second"]
    return Rates(by_phase["prefill"], by_phase["decode"], figures["total_tokens_per_second"])
