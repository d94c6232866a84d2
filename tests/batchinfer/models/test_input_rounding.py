"""Whole models whose inputs are rounded as their checkpoints ask, beside transformers with compressed-tensors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engines import compare_logits, engine_of, prompts_of, tokens
from quantized_models import DYNAMIC, FORMATS, GROUP, checkpoints, compressed
from safetensors.torch import load_file, save_file

from batchinfer.engine.engine import Engine
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams


def difference(engine: Engine, oracle: Any) -> float:
    """Return the error of all logits together, relative to the oracle's."""
    ours, expected = (torch.stack(c) for c in zip(*compare_logits(engine, oracle, prompts_of(12, 100)), strict=True))
    return float((ours - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", ["fp8", "fp8-static", "fp8-block", "w4afp8"])
def test_inputs_are_rounded_to_float8_as_transformers_rounds_them(
    make_model: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    """A number near the middle between two of float8 may go to either, so that logits differ by more than rounding to
    float32 does. But they are far nearer than those with inputs that are not rounded. Layers would multiply both."""
    quantized, _ = checkpoints(make_model("llama", num_hidden_layers=1), tmp_path, *FORMATS[form])
    oracle = transformers.AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32).eval()
    engine = engine_of(quantized)
    rounded, left = difference(engine, oracle), difference(engine_of(quantized, quantization="none"), oracle)
    assert rounded < 0.1 * left and left > 0.01, (rounded, left)
    assert engine.stats().notes == [
        f"the checkpoint is {engine.runner.decoder.config.form.name}: its matrices are expanded to float32 at load; "
        "inputs of floating-point products are rounded to float8_e4m3fn, as it asks"
    ]


def test_matrices_that_share_an_input_may_round_it_in_other_ways(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers and compressed-tensors round it for each module by itself."""
    quantized, _ = checkpoints(make_model("llama", num_hidden_layers=1), tmp_path, *FORMATS["fp8-static"])
    stored = load_file(quantized / "model.safetensors")
    stored["model.layers.0.self_attn.k_proj.input_scale"] /= 3
    stored["model.layers.0.mlp.gate_proj.input_scale"] *= 3
    save_file(stored, quantized / "model.safetensors", {"format": "pt"})
    oracle = transformers.AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32).eval()
    assert difference(engine_of(quantized), oracle) < 0.01


def test_static_scales_of_int8_inputs_are_replaced_and_named(make_model: Callable[..., Path], tmp_path: Path) -> None:
    inputs = {**DYNAMIC, "type": "int", "strategy": "tensor", "dynamic": False}
    static = compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}, inputs)
    quantized, plain = checkpoints(make_model("llama"), tmp_path, *static)
    requests = Requests.of(prompts_of(4, 50), SamplingParams(max_tokens=4, ignore_eos=True))
    engine = engine_of(quantized)
    assert tokens(engine, requests) == tokens(engine_of(plain, quantization="w8a8-int8"), requests)
    assert engine.stats().notes == [
        "the checkpoint is compressed-tensors, int-quantized 8 bits: 8-bit products; its scales of inputs are replaced "
        "by per-token scales"
    ]


@pytest.mark.parametrize(
    ("form", "settings", "name"),
    [
        ("fp8-block", {"weight_block_size": [GROUP, GROUP]}, "block FP8"),
        ("fp8-static", {"weight_block_size": None, "activation_scheme": "static"}, "FP8 with a scale a tensor"),
    ],
)
def test_fp8_of_hugging_face_rounds_inputs_as_compressed_tensors_does(
    make_model: Callable[..., Path], tmp_path: Path, form: str, settings: dict[str, Any], name: str
) -> None:
    """transformers multiplies them in kernels for GPUs alone; compressed-tensors has the same numbers on a CPU."""
    other, _ = checkpoints(make_model("llama"), tmp_path, *FORMATS[form])
    ours = shutil.copytree(other, tmp_path / "ours")
    stored = load_file(other / "model.safetensors")
    renamed = {
        name.replace("weight_scale", "weight_scale_inv").replace("input_scale", "activation_scale"): tensor
        for name, tensor in stored.items()
    }
    save_file(renamed, ours / "model.safetensors", {"format": "pt"})
    raw = json.loads((other / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8", **settings}
    (ours / "config.json").write_text(json.dumps(raw))
    requests = Requests.of(prompts_of(16, 100), SamplingParams(max_tokens=16, ignore_eos=True))
    engine = engine_of(ours)
    expected = tokens(engine_of(other), requests)
    assert tokens(engine, requests) == expected != tokens(engine_of(ours, quantization="none"), requests)
    assert engine.stats().notes[0].startswith(f"the checkpoint is {name}: its matrices are expanded to float32")


@pytest.mark.parametrize(
    ("form", "words", "kernel"),
    [
        ("fp8", ": 8-bit products", "linear_w8a8 (fp8)"),
        ("fp8-static", ": 8-bit products; its scales of inputs are replaced by per-token scales", "linear_w8a8 (fp8)"),
        ("fp8-tensor", ": 8-bit products; its scales of inputs are replaced by per-token scales", "linear_w8a8 (fp8)"),
        ("fp8-block", "expanded to float32 at load; inputs of floating-point products are rounded to float8", "linear"),
        ("w4afp8", "expanded to float32 at load; inputs of floating-point products are rounded to float8", "linear"),
    ],
)
def test_a_gpu_multiplies_float8_that_has_a_scale_for_each_channel(
    make_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    words: str,
    kernel: str,
) -> None:
    """In Triton's interpreter. Other float8 is multiplied in floating point, as on a CPU."""
    model = make_model("llama", num_hidden_layers=1, num_key_value_heads=6, hidden_size=96, intermediate_size=96)
    quantized, _ = checkpoints(model, tmp_path, *FORMATS[form])
    expected = engine_of(quantized)
    monkeypatch.setenv("BATCHINFER_KERNELS", "triton")
    engine = engine_of(quantized, max_num_seqs=2, kv_cache_tokens=256)
    assert words in engine.stats().notes[0] and kernel in engine.stats().kernels
    assert [name for name in engine.stats().kernels if "w8a8" in name] == ([kernel] if "w8a8" in kernel else [])
    if kernel == "linear":
        requests = Requests.of(prompts_of(2, 20), SamplingParams(max_tokens=2, ignore_eos=True))
        assert tokens(engine, requests) == tokens(expected, requests)
