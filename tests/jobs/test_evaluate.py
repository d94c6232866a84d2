"""Evaluation against transformers' own loss, and against itself."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from engines import engine_of
from families import QUICK, made
from repository import TARGET
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from batchinfer.jobs import quantize
from batchinfer.jobs.fingerprints import model_digest
from batchinfer.jobs.plan.quality_file import Quality, read_qualities
from batchinfer.quality.distances import divergences, log_likelihoods
from batchinfer.quality.evaluator import Evaluator

WINDOWS = [np.random.default_rng(n).integers(2, 320, n).astype(np.int32) for n in (2, 33, 64, 200)]


@pytest.mark.parametrize("case", QUICK)
def test_perplexity_is_that_of_transformers_own_loss(make_model: Callable[..., Path], case: str) -> None:
    model = made(make_model, case)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for window in WINDOWS:
            ids = torch.from_numpy(window.astype(np.int64))[None]
            logits = oracle(ids).logits[0, :-1]  # some mixtures add the loss of their router to that of the text
            total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
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


def spoiled(model: Path, output: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(model, output)
    weights = load_file(model / "model.safetensors")
    save_file({name: change(name, w) for name, w in weights.items()}, output / "model.safetensors", {"format": "pt"})
    return output


def test_errors_by_layer_are_those_of_transformers_hidden_states(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_model("qwen3")
    noise = {f"model.layers.1.{name}.weight": 0.02 for name in ("self_attn.v_proj", "mlp.down_proj")}
    changed = spoiled(model, tmp_path / "m", lambda name, w: w + noise.get(name, 0.0) * torch.randn_like(w))
    evaluator = Evaluator(engine_of(changed), engine_of(model))
    scores = evaluator.scores(WINDOWS)
    assert evaluator.layers is not None and not evaluator.notes

    load = transformers.AutoModelForCausalLM.from_pretrained
    right, wrong = (load(folder, dtype=torch.float32).eval() for folder in (model, changed))
    sums = torch.zeros(4, 3, dtype=torch.float64)
    divergence = 0.0
    for window in WINDOWS:
        ids = torch.from_numpy(window.astype(np.int64))[None]
        with torch.no_grad():
            expected, found = (m(ids, output_hidden_states=True) for m in (right, wrong))
            states, own = [hidden_states(m, ids) for m in (right, wrong)]
            angles = right.model.rotary_emb(states[0], torch.arange(len(window))[None])
            mask = torch.full((1, 1, len(window), len(window)), float("-inf")).triu(1)
            for i, layer in enumerate(wrong.model.layers):
                fed = layer(states[i], attention_mask=mask, position_embeddings=angles)
                pairs = ((fed, states[i + 1]), (states[i + 1], states[i]), (own[i + 1], states[i + 1]))
                for place, (a, b) in enumerate((*pairs, (states[i + 1], torch.zeros(())))):
                    sums[place, i] += (a.double() - b.double()).square().sum()
            p, q = (output.logits[0, :-1].double().log_softmax(-1) for output in (expected, found))
            divergence += float((p.exp() * (p - q)).sum())
    figures = torch.tensor(evaluator.layers.figures(), dtype=torch.float64)
    lost, added, drift, stream = sums
    torch.testing.assert_close(figures[1, 0], (lost / added).sqrt()[1], rtol=1e-3, atol=0.0)
    torch.testing.assert_close(figures[1:, 1], (drift / stream).sqrt()[1:], rtol=1e-3, atol=0.0)
    assert figures[1, 0] > 0.05 and figures[0].tolist() == [0.0, 0.0] and figures[2, 0] == 0.0 < figures[2, 1]
    assert scores.divergence == pytest.approx(divergence, rel=1e-3)


def hidden_states(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The residual stream before each layer and after the last: transformers gives that one normed."""
    last: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    states = model(ids, output_hidden_states=True).hidden_states
    hook.remove()
    return [*states[:-1], *last]


@pytest.mark.parametrize("quantization", ["auto", "w8a8-int8"])
def test_a_layer_fed_alone_leaves_the_model_as_it_is(make_model: Callable[..., Path], quantization: str) -> None:
    """The keys of the layer that was fed are gone again when the model runs on its own."""
    model = make_model("llama", dtype="bfloat16")
    engine = engine_of(model, quantization=quantization)
    evaluator = Evaluator(engine, engine_of(model))
    together, alone = evaluator.scores(WINDOWS), Evaluator(engine).scores(WINDOWS)
    assert together.negative_log_likelihood == alone.negative_log_likelihood
    assert evaluator.layers is not None
    errors = [own for own, _ in evaluator.layers.figures()]
    assert (min(errors) > 0) == (quantization != "auto") and max(errors) < 0.1


def test_a_rotated_residual_stream_is_not_compared_by_layer(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model("llama")
    rotation = torch.linalg.qr(torch.randn(96, 96))[0]
    folded = {"q": "input", "k": "input", "v": "input", "gate": "post_attention", "up": "post_attention"}
    weights = load_file(model / "model.safetensors")

    def rotate(name: str, w: torch.Tensor) -> torch.Tensor:
        module, at = name.split(".")[-2], name.rpartition(".")[0].rpartition(".")[0].rpartition(".")[0]
        if "norm" in module:
            return torch.ones_like(w)
        if module == "lm_head":
            return w * weights["model.norm.weight"] @ rotation
        if module.removesuffix("_proj") in folded:
            return w * weights[f"{at}.{folded[module.removesuffix('_proj')]}_layernorm.weight"] @ rotation
        return w @ rotation if "embed" in module else rotation.T @ w

    rotated = spoiled(model, tmp_path / "m", rotate)
    evaluator = Evaluator(engine_of(rotated), engine_of(model))
    scores = evaluator.scores(WINDOWS)
    assert scores.divergence / scores.tokens == pytest.approx(0, abs=1e-5)
    assert evaluator.layers is None and "no errors by layer: the embedding differs" in evaluator.notes[0]


def test_a_reference_may_have_another_shape_but_not_another_vocabulary(make_model: Callable[..., Path]) -> None:
    engine = engine_of(make_model("llama"))
    for field, value, message in (
        ("num_hidden_layers", 2, "layers is 3 in the model and 2 in the reference"),
        ("hidden_size", 192, "hidden_size is 96 in the model and 192 in the reference"),
    ):
        evaluator = Evaluator(engine, engine_of(make_model("llama", **{field: value})))
        assert evaluator.layers is None and message in evaluator.notes[0]
        assert evaluator.scores(WINDOWS).divergence > 0
    with pytest.raises(ValueError, match="vocab_size is 320 in the model and 330 in the reference"):
        Evaluator(engine, engine_of(make_model("llama", vocab_size=330)))


def test_metrics_are_their_definitions() -> None:
    expected, found = torch.randn(7, 50), torch.randn(7, 50)
    p, q = expected.double().softmax(-1), found.double().softmax(-1)
    torch.testing.assert_close(divergences(expected, found).double(), (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-6)
    targets = torch.arange(7)
    nll = F.cross_entropy(found, targets, reduction="none")
    torch.testing.assert_close(-log_likelihoods(found, targets), nll)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = TARGET
    texts = ["import os\n\n\ndef path(x):\n    return os.path.join(x, 'a')\n" * 10, None, "", "x"]
    pq.write_table(pa.table({"text": texts, "n": [1, 2, 3, 4]}), tmp_path / "t.parquet")
    program = Path(sys.executable).with_name("batchinfer")

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [program, "evaluate", model, "--data", tmp_path / "t.parquet", *flags]
        return subprocess.run(command, capture_output=True, text=True)

    flags = ("--column", "text", "--context", "64", "--quantization", "w8a8-int8", "--reference", str(model))
    done = run(*flags, "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.svg"))
    assert "perplexity" in done.stdout and "top-1 agreement" in done.stdout, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["notes"] == ["left out: 2 rows with less than two tokens of text, first row 1"]
    assert [layer["layer"] for layer in figures["layers"]] == [*range(6)]
    worst = max(figures["layers"], key=lambda layer: layer["own"])
    assert f"largest error    layer {worst['layer']}" in done.stdout
    assert f"layer {worst['layer']}: adds the most" in (tmp_path / "out.svg").read_text("utf-8")
    assert figures["scheme"] == "w8a8-int8 from bfloat16" and figures["quantization"] == "w8a8-int8"
    (known,) = read_qualities(model_digest(model)).items()
    assert known == (
        "w8a8-int8, KV float32",
        Quality(figures["divergence"], figures["top1_agreement"], figures["tokens"], str(model), "evaluate"),
    )
    assert figures["perplexity"] < 10 and 0 < figures["divergence"] < 0.1 and figures["top1_agreement"] > 0.9
    for wrong, code, message in (
        (("--column", "n"), 65, "column 'n' has no text of two tokens or more"),
        (("--column", "txt"), 65, "has no column 'txt'; its columns are 'text', 'n'"),
        (("--column", "text", "--context", "1"), 2, "--context is 1; it must be from 2 to 1151 for this model"),
        (
            ("--column", "text", "--plot", "p.svg"),
            2,
            "each layer's distance from a reference: name one with --reference",
        ),
        (("--column", "text", "--plot", "p.png", "--reference", "m"), 2, "--plot is p.png; its name must end in .svg"),
        (("--column", "text", "--context", "9999"), 2, "--context is 9999; it must be from 2 to 1151 for this model"),
    ):
        failed = run(*wrong)
        assert failed.returncode == code and message in failed.stderr, failed.stderr
        assert "Traceback" not in failed.stderr
