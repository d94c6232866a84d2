"""Whole models from quantized checkpoints: the same text as from the dequantized weights."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from compiled import paths
from engines import compare_logits, engine_of, prompts_of, tokens
from quantized_models import FORMATS, GROUP, checkpoints, gptq_8_bits
from repository import STDLIB
from safetensors.torch import load_file, save_file

from batchinfer.engine.config import FEW_ROWS
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.formats.matrix import QuantizedMatrix
from batchinfer.formats.registry import checkpoint_format
from batchinfer.jobs.job import run
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.quantize import CalibrationRows, quantize
from batchinfer.jobs.spec import JobSpec, sharded
from batchinfer.kernels.cpu_library import REFERENCE
from batchinfer.kernels.linear import Linear
from batchinfer.kernels.linear_w4a8_cpu import PackedW4A8
from batchinfer.kernels.linear_w4a16 import LinearW4A16
from batchinfer.kernels.linear_w8a8 import LinearW8A8
from batchinfer.kernels.linear_w8a8_cpu import PackedW8A8
from batchinfer.models.weights import RandomWeights

EXPANDED = ["fp8-tensor", "nvfp4", "mxfp4", "nf4", "bitsandbytes-int8"]
"""Formats whose matrices are expanded at load, whatever the family and the settings."""


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in EXPANDED])
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


@pytest.mark.parametrize("form", EXPANDED)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_are_those_of_transformers_with_the_weights_it_stands_for(
    make_model: Callable[..., Path], tmp_path: Path, form: str, family: str
) -> None:
    quantized, plain = checkpoints(make_model(family), tmp_path, *FORMATS[form])
    oracle = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    engine = engine_of(quantized, quantization="none" if "fp8" in form else "auto")
    for ours, expected in compare_logits(engine, oracle, prompts_of(8, 100)):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    asked = "; inputs are left in floating point, though it asks for nvfp4" if form == "nvfp4" else ""
    if "fp4" in form:
        assert engine.stats().notes[0].endswith(f"its matrices are expanded to float32 at load{asked}")


@pytest.mark.parametrize(
    "config",
    [
        {
            **FORMATS["gptq"][0],
            "dynamic": {r"-:.*\.o_proj": {}, r"+:.*down_proj": {"bits": 8, "group_size": -1, "sym": True}},
        },
        {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "bits": 4,
            "group_size": GROUP,
            "sym": False,
            "extra_config": {"o_proj": {"bits": 16}, ".*down_proj": {"bits": 8, "group_size": -1, "sym": True}},
        },
    ],
)
def test_modules_may_have_settings_of_their_own(
    make_model: Callable[..., Path], tmp_path: Path, config: dict[str, Any]
) -> None:
    others = {"down_proj": gptq_8_bits, "o_proj": None}
    quantized, plain = checkpoints(make_model("qwen2"), tmp_path, config, FORMATS["gptq"][1], others)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    for ours, expected in compare_logits(engine_of(quantized), oracle, prompts_of(8, 100)):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_weights_of_4_bits_in_floating_point_are_refused_where_kernels_are_a_gpus(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, _ = checkpoints(make_model("llama"), tmp_path, *FORMATS["mxfp4"])
    monkeypatch.setenv("BATCHINFER_KERNELS", "triton")
    with pytest.raises(ValueError, match="mxfp4-pack-quantized 4 bits, for which there is no kernel on a GPU yet"):
        engine_of(quantized)


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4", "fp8-tensor"])
def test_random_weights_are_of_usual_size(form: str) -> None:
    weights = RandomWeights(torch.float32, torch.device("cpu"), checkpoint_format(FORMATS[form][0]))
    weight = weights.matrix("m", (64, 96))
    assert isinstance(weight, QuantizedMatrix) and 0.005 < weight.dequantize().std() < 0.05


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


W4A8 = pytest.mark.parametrize("form", ["awq", "pack-channel", "signed-channel"])


@W4A8
@pytest.mark.parametrize("head", ["", "+head"])
@pytest.mark.parametrize("path", [REFERENCE, *paths()])
def test_w4a8_is_8_bit_products_of_4_bit_weights(
    make_model: Callable[..., Path], tmp_path: Path, form: str, head: str, path: str
) -> None:
    quantized, plain = checkpoints(make_model("llama"), tmp_path, *FORMATS[form])
    engine = engine_of(quantized, quantization=f"w4a8{head}", cpu_path=path)
    decoder = engine.runner.decoder
    of_layers, eight_bits = (LinearW8A8, LinearW8A8) if path == REFERENCE else (PackedW4A8, PackedW8A8)
    assert {type(p) for layer in decoder.layers for p in layer.products} == {of_layers}
    assert isinstance(decoder.head, eight_bits if head else Linear)
    words = "rounded to 8 bits by channel at load" if path == REFERENCE else "stay in 4 bits, for 8-bit inputs"
    assert [words in note for note in engine.stats().notes if "checkpoint" in note] == [True]
    oracle = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    pairs = list(compare_logits(engine, oracle, prompts_of(8, 100)))
    found, expected = (torch.stack(column) for column in zip(*pairs, strict=True))
    assert (found - expected).norm() / expected.norm() < 0.05, "inputs are rounded to 8 bits"


@W4A8
def test_without_kernels_in_c_w4a8_holds_8_bits_by_channel(
    make_model: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    quantized, plain = checkpoints(make_model("llama"), tmp_path, *FORMATS[form])
    requests = Requests.of(prompts_of(16, 100), SamplingParams(max_tokens=16, ignore_eos=True))
    engine = engine_of(quantized, quantization="w4a8", cpu_path=REFERENCE)
    if form == "awq":  # groups are rounded again, as those of any weights
        same = engine_of(plain, quantization="w8a8-int8", cpu_path=REFERENCE)
        assert tokens(engine, requests) == tokens(same, requests)
    else:  # a scale a channel: held just as it is stored
        stored = load_file(quantized / "model.safetensors")["model.layers.0.self_attn.o_proj.weight_scale"]
        assert engine.runner.decoder.layers[0].output.scale.equal(stored.flatten())


@pytest.mark.parametrize("path", paths())
def test_w4a8_names_products_of_sizes_that_do_not_stay_in_4_bits(
    make_model: Callable[..., Path], tmp_path: Path, path: str
) -> None:
    quantized, _ = checkpoints(make_model("llama", intermediate_size=168), tmp_path, *FORMATS["pack-channel"])
    engine = engine_of(quantized, quantization="w4a8", cpu_path=path)
    kinds = [type(p) for p in engine.runner.decoder.layers[0].products]
    assert kinds == [PackedW4A8, PackedW4A8, PackedW4A8, PackedW8A8]
    assert engine.stats().notes[1] == (
        "the 4-bit kernel does not take 3 of the products, which are expanded: the first is "
        "model.layers.0.mlp.down_proj"
    )


@pytest.mark.parametrize("path", paths())
def test_rows_of_w4a8_depend_on_no_batch(make_model: Callable[..., Path], tmp_path: Path, path: str) -> None:
    quantized, _ = checkpoints(make_model("mistral", sliding_window=100), tmp_path, *FORMATS["awq"])
    common = {"quantization": "w4a8+head", "cpu_path": path}
    requests = Requests.of(prompts_of(30, 250), SamplingParams(max_tokens=12, ignore_eos=True))
    expected = tokens(engine_of(quantized, **common), requests)
    assert len({tuple(new) for new in expected.values()}) > 20
    for settings in ({"max_num_seqs": 1}, {"max_num_seqs": 3}, {"max_num_batched_tokens": 64}):
        assert tokens(engine_of(quantized, **common, **settings), requests) == expected, settings


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
        (2, {"quantization": "w4a8", "cpu_path": REFERENCE}, "are rounded to 8 bits by channel at load"),
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
