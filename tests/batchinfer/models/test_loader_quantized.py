"""Whole models from quantized checkpoints: the same text as from the dequantized weights."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from engines import compare_logits, engine_of, prompts_of, tokens
from packers import awq_tensors, gptq_tensors
from repository import STDLIB
from safetensors.torch import load_file, save_file
from torch import Tensor

from batchinfer.engine.config import FEW_ROWS
from batchinfer.engine.engine import Engine
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.jobs.job import run
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.quantize import CalibrationRows, quantize
from batchinfer.jobs.spec import JobSpec, sharded
from batchinfer.kernels.linear import Linear
from batchinfer.kernels.linear_w4a16 import LinearW4A16
from batchinfer.kernels.linear_w8a8 import LinearW8A8

GROUP = 32
Writer = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]  # a weight to (stored tensors, what they stand for)


def grouped(weight: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tensor]:
    """(q, z, scales, what they stand for) of 4 bits in groups, by the extremes of each."""
    w = weight.float().numpy().reshape(len(weight), -1, GROUP)
    low, high = w.min(-1).clip(max=0), w.max(-1).clip(min=0)
    scales = ((high - low) / 15).astype(np.float16)
    z = np.round(-low / scales).clip(1, 15).astype(np.int64)
    q = (np.round(w / scales[..., None]) + z[..., None]).clip(0, 15).astype(np.int64)
    back = ((q - z[..., None]) * scales[..., None].astype(np.float32)).reshape(weight.shape)
    return q.reshape(weight.shape), z, scales, torch.from_numpy(back.astype(np.float32))


def gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    q, z, scales, back = grouped(weight)
    return gptq_tensors(q, z, scales, [k // GROUP for k in range(weight.shape[1])], 4, "gptq"), back


def awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    q, z, scales, back = grouped(weight)
    return awq_tensors(q, z, scales), back


def signed_scales(weight: Tensor, group: int) -> Tensor:
    """Scales [N, G] as AutoRound chooses them: of the sign with which a group's largest value becomes -8."""
    groups = weight.float().unflatten(1, (-1, group))
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0] / -8


def signed_gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """AutoRound in the layout of GPTQ: symmetric, no g_idx."""
    scales = signed_scales(weight, GROUP).half()
    wide = scales.float().repeat_interleave(GROUP, 1)
    q = (weight.float() / wide).round().clamp(-8, 7)
    numbers, z = (q + 8).long().numpy(), np.full(scales.shape, 8)
    stored = gptq_tensors(numbers, z, scales.numpy(), [k // GROUP for k in range(weight.shape[1])], 4, "gptq")
    del stored["g_idx"]
    return stored, q * wide


def library(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None, signed: bool = False) -> Writer:
    """By the compressed-tensors library, scales from the largest value; a static scale of inputs is `STATIC`."""
    most = 448.0 if form == "float-quantized" else 127.0 if weights["num_bits"] == 8 else 7.0
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    compressor = BaseCompressor.get_value_from_registry(form)

    def write(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        weight = weight.float()
        group = weight.shape[1] if weights["strategy"] in ("tensor", "channel") else GROUP
        scale = weight.unflatten(1, (-1, group)).abs().amax(-1) / most
        if weights["strategy"] == "tensor":
            scale = scale.amax(0)
        elif weights["strategy"] == "block":
            scale = scale.unflatten(0, (-1, GROUP)).amax(1)
        scale = signed_scales(weight, group) if signed else scale
        stored = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        if inputs is not None and not inputs["dynamic"]:
            stored["input_scale"] = torch.tensor([STATIC])
        return stored, compressor.decompress(stored, scheme)["weight"].float()

    return write


def compressed(
    form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, signed: bool = False
) -> tuple[dict[str, Any], Writer]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return {**config, "ignore": ["lm_head"], "quantization_status": "compressed"}, library(
        form, weights, inputs, signed
    )


STATIC = 0.02  # numbers beyond 9 become 9: some inputs of a tiny model with loud weights are
DYNAMIC = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
FORMATS: dict[str, tuple[dict[str, Any], Writer]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}, gptq),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, awq),
    "pack": compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}),
    "pack-channel": compressed("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "signed-gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}, signed_gptq),
    "signed-pack": compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}, None, True),
    "signed-channel": compressed("pack-quantized", {"num_bits": 4, "strategy": "channel"}, None, True),
    "int": compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}, {**DYNAMIC, "type": "int"}),
    "fp8": compressed(
        "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, {**DYNAMIC, "type": "float"}
    ),
    "fp8-static": compressed(
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        {**DYNAMIC, "type": "float", "strategy": "tensor", "dynamic": False},
    ),
    "fp8-block": compressed(
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [GROUP, GROUP]},
        {**DYNAMIC, "type": "float", "strategy": "group", "group_size": GROUP},
    ),
    "w4afp8": compressed(
        "int-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}, {**DYNAMIC, "type": "float"}
    ),
}


def checkpoints(model: Path, folder: Path, config: dict[str, Any], write: Writer) -> tuple[Path, Path]:
    """(quantized, the same weights in float32) beside each other in `folder`."""
    quantized, plain = folder / "quantized", folder / "plain"
    stored: dict[str, Tensor] = {}
    stands_for: dict[str, Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            parts, back = write(tensor)
            stored |= {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in parts.items()}
        else:  # a scale a channel: held just as it is stored
            stored[name] = back = tensor
        stands_for[name] = back
    for target, tensors in ((quantized, stored), (plain, stands_for)):
        shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    raw = json.loads((model / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**raw, "quantization_config": config}))
    return quantized, plain


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_greedy_text_is_that_of_the_weights_it_stands_for(
    make_model: Callable[..., Path], tmp_path: Path, form: str, family: str
) -> None:
    quantized, plain = checkpoints(make_model(family), tmp_path, *FORMATS[form])
    requests = Requests.of(prompts_of(16, 100), SamplingParams(max_tokens=16, ignore_eos=True))
    to_float8 = "fp8" in form
    engine = engine_of(quantized, quantization="none" if to_float8 else "auto")
    scheme = "w8a8-int8" if form == "int" else "none"
    assert tokens(engine, requests) == tokens(engine_of(plain, quantization=scheme), requests)
    note = "8-bit products" if form == "int" else "its matrices are expanded to float32 at load"
    note += "; inputs are left in floating point: --quantization none" if to_float8 else ""
    assert [note in text for text in engine.stats().notes] == [True]


@pytest.mark.parametrize("form", ["pack", "signed-pack", "fp8"])
def test_logits_are_those_that_transformers_computes(
    make_model: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    """transformers with the compressed-tensors library, which expands the weights on a CPU."""
    config, write = copy.deepcopy(FORMATS[form][0]), FORMATS[form][1]
    config["config_groups"]["group_0"]["input_activations"] = None
    quantized, _ = checkpoints(make_model("llama"), tmp_path, config, write)
    settings = transformers.CompressedTensorsConfig(run_compressed=False)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        quantized, dtype=torch.float32, quantization_config=settings
    ).eval()
    for ours, expected in compare_logits(engine_of(quantized), oracle, prompts_of(8, 100)):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def difference(engine: Engine, oracle: Any) -> float:
    """Of all logits, relative to the oracle's."""
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


def test_scales_of_keys_and_values_and_a_folded_transform_change_nothing(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    config, write = FORMATS["pack"]
    places = [{"targets": ["re:.*_proj"], "location": place} for place in ("weight_input", "weight_output")]
    more = {
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
        "transform_config": {"config_groups": {"R1": {"type": "hadamard", "apply": places}}},
    }
    model = make_model("llama")
    quantized, plain = checkpoints(model, tmp_path, {**config, **more}, write)
    stored = load_file(quantized / "model.safetensors")
    for i in range(3):
        stored |= {f"model.layers.{i}.self_attn.{side}_scale": torch.tensor([0.5]) for side in "kv"}
    save_file(stored, quantized / "model.safetensors", {"format": "pt"})
    requests = Requests.of(prompts_of(4, 50), SamplingParams(max_tokens=4, ignore_eos=True))
    engine = engine_of(quantized)
    assert tokens(engine, requests) == tokens(engine_of(plain), requests)
    assert "pack-quantized 4 bits, its kv_cache_scheme left aside: its matrices" in engine.stats().notes[0]


def test_block_fp8_rounds_inputs_by_the_columns_of_a_block(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """transformers multiplies them in a kernel for GPUs alone; compressed-tensors has the same blocks on a CPU."""
    other, _ = checkpoints(make_model("llama"), tmp_path, *FORMATS["fp8-block"])
    block = shutil.copytree(other, tmp_path / "block")
    stored = load_file(other / "model.safetensors")
    renamed = {name.replace("weight_scale", "weight_scale_inv"): tensor for name, tensor in stored.items()}
    save_file(renamed, block / "model.safetensors", {"format": "pt"})
    raw = json.loads((other / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}
    (block / "config.json").write_text(json.dumps(raw))
    requests = Requests.of(prompts_of(16, 100), SamplingParams(max_tokens=16, ignore_eos=True))
    engine = engine_of(block)
    expected = tokens(engine_of(other), requests)
    assert tokens(engine, requests) == expected != tokens(engine_of(block, quantization="none"), requests)
    assert engine.stats().notes[0].startswith("the checkpoint is block FP8: its matrices are expanded to float32")


@pytest.mark.parametrize(
    ("form", "words", "kernel"),
    [
        ("fp8", ": 8-bit products", "linear_w8a8 (fp8)"),
        ("fp8-static", ": 8-bit products; its scales of inputs are replaced by per-token scales", "linear_w8a8 (fp8)"),
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


def test_a_4_bit_checkpoint_in_8_bit_products_is_asked_for_by_name(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    quantized, plain = checkpoints(make_model("llama"), tmp_path, *FORMATS["awq"])
    requests = Requests.of(prompts_of(16, 100), SamplingParams(max_tokens=16, ignore_eos=True))
    engine = engine_of(quantized, quantization="w8a8-int8")
    assert tokens(engine, requests) == tokens(engine_of(plain, quantization="w8a8-int8"), requests)
    assert "rounded to 8 bits by channel" in engine.stats().notes[0]


@pytest.mark.parametrize(
    ("family", "form"),
    [(family, "awq") for family in ("llama", "mistral", "qwen2", "qwen3")]
    + [("llama", "signed-gptq"), ("llama", "signed-pack"), ("llama", "signed-channel")],
)
def test_weights_that_stay_in_4_bits_make_the_logits_of_the_weights_they_stand_for(
    make_model: Callable[..., Path], tmp_path: Path, family: str, form: str
) -> None:
    """Beside transformers in float32, with inputs and sums of ours in bfloat16: as near as expanded weights come."""
    quantized, plain = checkpoints(make_model(family), tmp_path, *FORMATS[form])
    oracle = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    errors = []
    for batch, product in ((FEW_ROWS, LinearW4A16), (FEW_ROWS + 1, Linear)):
        engine = engine_of(quantized, dtype="bfloat16", expected_batch=batch)
        assert {type(p) for layer in engine.runner.decoder.layers for p in layer.products} == {product}
        pairs = list(compare_logits(engine, oracle, prompts_of(24, 100)))
        ours, expected = (torch.stack(column) for column in zip(*pairs, strict=True))
        errors.append((ours - expected).norm() / expected.norm())
    assert errors[0] < 0.03 and errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("form", ["gptq", "awq", "pack"])
@pytest.mark.parametrize(
    ("settings", "words", "packed"),
    [
        ({"expected_batch": 4}, "stay in 4 bits, for int4pack: expected batch 4 <= 4", True),
        ({"max_num_seqs": 4}, "stay in 4 bits, for int4pack: expected batch 4 <= 4", True),
        ({"expected_batch": 5}, "are expanded to bfloat16 at load: expected batch 5 > 4", False),
        ({}, "are expanded to bfloat16 at load: expected batch 16 > 4", False),
        (
            {"expected_batch": 1, "dtype": "float32"},
            "are expanded to float32 at load: int4pack computes in bfloat16 alone",
            False,
        ),
        (
            {"expected_batch": 1, "quantization": "none"},
            "are expanded to bfloat16 at load: --quantization none",
            False,
        ),
    ],
)
def test_the_path_of_4_bit_weights_is_chosen_by_the_expected_batch(
    make_model: Callable[..., Path], tmp_path: Path, form: str, settings: dict[str, Any], words: str, packed: bool
) -> None:
    quantized, _ = checkpoints(make_model("llama"), tmp_path, *FORMATS[form])
    engine = engine_of(quantized, **{"dtype": "bfloat16", **settings})
    stats = engine.stats()
    assert [words in note for note in stats.notes] == [True]
    assert stats.kernels.get("linear_w4a16") == ("cpu" if packed else None)
    weights = sum(p.nbytes for layer in engine.runner.decoder.layers for p in layer.products)
    expanded = engine.runner.decoder.operations_per_token // 2 * engine.runner.dtype.itemsize
    assert weights == expanded if not packed else weights < expanded / 3


def test_4_bit_rows_depend_on_no_batch(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """However few rows a step has: those of products in 4 bits are not padded."""
    quantized, _ = checkpoints(make_model("mistral", sliding_window=100), tmp_path, *FORMATS["awq"])
    common = {"dtype": "bfloat16", "expected_batch": FEW_ROWS}
    requests = Requests.of(prompts_of(30, 250), SamplingParams(max_tokens=12, ignore_eos=True))
    together = engine_of(quantized, **common)
    expected = tokens(together, requests)
    assert together.stats().padded_tokens == 0
    assert len({tuple(new) for new in expected.values()}) > 20
    for settings in ({"max_num_seqs": 1}, {"max_num_seqs": 3}, {"max_num_batched_tokens": 64}):
        assert tokens(engine_of(quantized, **common, **settings), requests) == expected, settings


def test_4_bit_products_of_sizes_that_int4pack_does_not_take_are_expanded_and_named(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    quantized, _ = checkpoints(make_model("llama", intermediate_size=168), tmp_path, *FORMATS["pack-channel"])
    engine = engine_of(quantized, dtype="bfloat16", expected_batch=1)
    kinds = [type(p) for p in engine.runner.decoder.layers[0].products]
    assert kinds == [LinearW4A16, LinearW4A16, LinearW4A16, Linear]
    assert engine.stats().notes[1] == (
        "the 4-bit kernel does not take 3 of the products, which are expanded: the first is "
        "model.layers.0.mlp.down_proj"
    )
    tokens(engine, Requests.of(prompts_of(3, 50), SamplingParams(max_tokens=3)))


@pytest.mark.parametrize("form", ["awq", "pack-channel", "signed-channel"])
def test_w4a8_is_8_bit_products_of_4_bit_weights(make_model: Callable[..., Path], tmp_path: Path, form: str) -> None:
    quantized, plain = checkpoints(make_model("llama"), tmp_path, *FORMATS[form])
    requests = Requests.of(prompts_of(16, 100), SamplingParams(max_tokens=16, ignore_eos=True))
    for head in ("", "+head"):
        engine = engine_of(quantized, quantization=f"w4a8{head}")
        decoder = engine.runner.decoder
        assert {type(p) for layer in decoder.layers for p in layer.products} == {LinearW8A8}
        assert isinstance(decoder.head, LinearW8A8 if head else Linear)
        ours = tokens(engine, requests)
        if form == "awq":  # groups are rounded again, as those of any weights
            assert ours == tokens(engine_of(plain, quantization=f"w8a8-int8{head}"), requests)
            assert "rounded to 8 bits by channel at load" in engine.stats().notes[0]
        else:  # a scale a channel: held just as it is stored
            stored = load_file(quantized / "model.safetensors")["model.layers.0.self_attn.o_proj.weight_scale"]
            assert decoder.layers[0].output.scale.equal(stored.flatten())
            oracle = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
            pairs = list(compare_logits(engine, oracle, prompts_of(8, 100)))
            found, expected = (torch.stack(column) for column in zip(*pairs, strict=True))
            assert (found - expected).norm() / expected.norm() < 0.05, "inputs are rounded to 8 bits"


def test_w4a8_without_4_bit_weights_is_refused(make_model: Callable[..., Path], tmp_path: Path) -> None:
    quantized, plain = checkpoints(make_model("llama"), tmp_path, *FORMATS["int"])
    for model in (quantized, plain):
        with pytest.raises(ValueError, match=r"w4a8 needs a checkpoint with 4-bit weights.*layers.0.self_attn.q_proj"):
            engine_of(model, quantization="w4a8")


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        (4, {}, "stay in 4 bits, for int4pack: expected batch 4 <= 4"),
        (5, {}, "are expanded to bfloat16 at load: expected batch 5 > 4"),
        (2, {"quantization": "w4a8"}, "are rounded to 8 bits by channel at load"),
        (5, {"max_num_seqs": 2}, "stay in 4 bits, for int4pack: expected batch 2 <= 4"),
    ],
)
def test_the_report_of_a_job_names_the_path_of_its_4_bit_weights(
    tmp_path: Path, rows: int, settings: dict[str, Any], words: str
) -> None:
    quantize(str(STDLIB / "target"), None, tmp_path / "model", "w4a16", "rtn", 128, CalibrationRows())
    pq.write_table(pa.table({"prompt": ["def f(x):"] * rows}), tmp_path / "in.parquet")
    spec = JobSpec(
        inputs=(tmp_path / "in.parquet",),
        output=tmp_path / "out.parquet",
        model=str(tmp_path / "model"),
        prompt_column="prompt",
        sampling=SamplingParams(max_tokens=4),
        **settings,
    )
    done = run(spec)
    assert done.rows_ok == rows
    assert [words in note for note in done.notes] == [True]
    assert ("linear_w4a16" in done.kernels) == ("int4pack" in words)


def test_shards_of_a_4_bit_job_answer_as_the_job_does_whole(tmp_path: Path) -> None:
    """Nine rows in two shards, of four and of five rows, on both sides of `FEW_ROWS`."""
    quantize(str(STDLIB / "target"), None, tmp_path / "model", "w4a16", "rtn", 128, CalibrationRows())
    texts = [f"def f{i}(x):" for i in range(2 * FEW_ROWS + 1)]
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "in.parquet")
    whole = JobSpec(
        inputs=(tmp_path / "in.parquet",),
        output=tmp_path / "out.parquet",
        model=str(tmp_path / "model"),
        prompt_column="prompt",
        sampling=SamplingParams(max_tokens=12),
    )
    shards = [replace(whole, output=sharded(whole.output, i, 2), shard=(i, 2)) for i in range(2)]
    notes = [run(job).notes for job in (whole, *shards)]
    assert "expected batch 9 > 4" in notes[0][0] and notes == 3 * [notes[0]]
    assert merge_shards([job.output for job in shards], tmp_path / "all.parquet", overwrite=False) == len(texts)
    assert pq.read_table(tmp_path / "all.parquet").equals(pq.read_table(whole.output))


def test_parts_of_one_product_that_do_not_go_together_are_refused(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    config, write = FORMATS["int"]
    quantized, _ = checkpoints(make_model("llama"), tmp_path, {**config, "ignore": ["lm_head"]}, write)
    raw = json.loads((quantized / "config.json").read_text())
    raw["quantization_config"]["ignore"].append("re:.*k_proj")
    tensors = load_file(quantized / "model.safetensors")
    for name in [name for name in tensors if "k_proj" in name]:
        if name.endswith("weight_scale"):
            del tensors[name]
        else:
            tensors[name] = tensors[name].float()
    save_file(tensors, quantized / "model.safetensors")
    (quantized / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        ValueError, match=r"q_proj.*k_proj.*v_proj: some are quantized for 8-bit inputs and some are not"
    ):
        engine_of(quantized)
