"""Evaluation against transformers' own loss, and against itself."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from engines import engine_of
from torch.nn import functional as F

from batchinfer.evaluator import Evaluator
from batchinfer.jobs import quantize
from batchinfer.quantize.metrics import divergences, log_likelihoods

WINDOWS = [np.random.default_rng(n).integers(2, 320, n).astype(np.int32) for n in (2, 33, 64, 200)]


def test_perplexity_is_that_of_transformers_own_loss(make_model: Callable[..., Path]) -> None:
    model = make_model("qwen2")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for window in WINDOWS:
            ids = torch.from_numpy(window.astype(np.int64))[None]
            total += float(oracle(ids, labels=ids).loss) * (len(window) - 1)
    scores = Evaluator(engine_of(model)).scores(WINDOWS)
    assert (scores.windows, scores.tokens) == (4, sum(len(w) - 1 for w in WINDOWS))
    assert scores.perplexity == pytest.approx(math.exp(total / scores.tokens), rel=1e-5)
    text = "".join(chr(256 + t) for w in WINDOWS for t in w[1:])
    assert scores.bits_per_byte == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)


def test_fewer_bits_are_further_from_the_reference(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model("llama")
    reference = engine_of(model)
    itself = Evaluator(engine_of(model), reference).scores(WINDOWS)
    assert itself.divergence == pytest.approx(0, abs=1e-6) and itself.agreed == itself.tokens
    scores = []
    for scheme, group_size in (("w8a16", None), ("w4a16", 32), ("w4a16", 0)):
        output = tmp_path / f"{scheme}-{group_size}"
        quantize.quantize(str(model), None, output, scheme, "rtn", group_size, quantize.CalibrationRows())
        scores.append(Evaluator(engine_of(output), reference).scores(WINDOWS))
    assert scores[0].divergence < 0.05 * scores[1].divergence < 0.05 * scores[2].divergence
    assert scores[0].agreed > scores[1].agreed > 0


def test_metrics_are_their_definitions() -> None:
    expected, found = torch.randn(7, 50), torch.randn(7, 50)
    p, q = expected.double().softmax(-1), found.double().softmax(-1)
    torch.testing.assert_close(divergences(expected, found).double(), (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-6)
    targets = torch.arange(7)
    nll = F.cross_entropy(found, targets, reduction="none")
    torch.testing.assert_close(-log_likelihoods(found, targets), nll)


def test_the_command(tmp_path: Path) -> None:
    model = Path(__file__).parents[1] / "examples/stdlib/target"
    texts = ["import os\n\n\ndef path(x):\n    return os.path.join(x, 'a')\n" * 10, None, "", "x"]
    pq.write_table(pa.table({"text": texts, "n": [1, 2, 3, 4]}), tmp_path / "t.parquet")
    program = Path(sys.executable).with_name("batchinfer")

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [program, "evaluate", model, "--data", tmp_path / "t.parquet", *flags]
        return subprocess.run(command, capture_output=True, text=True)

    flags = ("--column", "text", "--context", "64", "--quantization", "w8a8-int8", "--reference", str(model))
    done = run(*flags, "--json", str(tmp_path / "out.json"))
    assert "perplexity" in done.stdout and "top-1 agreement" in done.stdout, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["notes"] == ["2 rows have no text of two tokens, the first of them row 1"]
    assert figures["perplexity"] < 10 and 0 < figures["divergence"] < 0.1 and figures["top1_agreement"] > 0.9
    for wrong, code, message in (
        (("--column", "n"), 65, "column 'n' has no text of two tokens or more"),
        (("--column", "txt"), 65, "has no column 'txt'; its columns are 'text', 'n'"),
        (("--column", "text", "--context", "1"), 2, "--context is 1; it must be 2 or more"),
        (("--column", "text", "--context", "9999"), 65, "max_model_len is 10000"),
    ):
        failed = run(*wrong)
        assert failed.returncode == code and message in failed.stderr, failed.stderr
        assert "Traceback" not in failed.stderr
