"""Checkpoint formats against packers that handle one number at a time, tensors computed by hand, and libraries."""

import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.transform import TransformConfig
from packers import awq_tensors, gptq_tensors, int32, one_by_one, words_of
from stored import GROUP, K, N, Stored, check, read
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from batchinfer.formats.registry import checkpoint_format
from batchinfer.kernels.float8_inputs import InputScales


def drawn(bits: int, groups: int, symmetric: bool, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(q [N, K], z [N, G], scales [N, G] of both signs), every value of q and z among them."""
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 1 << bits, (N, K))
    z = np.full((N, groups), 1 << (bits - 1)) if symmetric else rng.integers(0, 1 << bits, (N, groups))
    scales = rng.uniform(0.5, 2.0, (N, groups)) * rng.choice([-1, 1], (N, groups))
    return q, z, scales.astype(np.float16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("reordered", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [GROUP, -1])
def test_gptq(bits: int, version: str, reordered: bool, symmetric: bool, group_size: int) -> None:
    groups = 1 if group_size == -1 else K // group_size
    q, z, scales = drawn(bits, groups, symmetric)
    order = np.random.default_rng(1).permutation(K) if reordered else np.arange(K)
    group_of = [int(order[k]) * groups // K for k in range(K)]
    tensors = gptq_tensors(q, z, scales, group_of, bits, version)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": reordered}
    matrix = read({**config, "checkpoint_format": version}, tensors)
    assert (matrix.group_of is not None) == (reordered and groups > 1)
    check(matrix, one_by_one(q, z, scales, group_of))


def test_gptq_by_hand() -> None:
    """One output, eight inputs, in one word: q = 1 .. 8, z = 3, scale = 0.5."""
    tensors = {
        "qweight": int32([[0x87654321 - (1 << 32)] * 8]),
        "qzeros": int32([[0x22222222]]),
        "scales": torch.full((1, 8), 0.5, dtype=torch.float16),
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False}
    weight = read(config, tensors, (8, 8)).dequantize()
    assert weight.tolist() == [[-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5]] * 8


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("group_size", [GROUP, -1])
def test_awq(zero_point: bool, group_size: int) -> None:
    groups = 1 if group_size == -1 else K // group_size
    q, z, scales = drawn(4, groups, symmetric=not zero_point)
    tensors = awq_tensors(q, z, scales)
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": zero_point, "version": "gemm"}
    check(read(config, tensors), one_by_one(q, z, scales, [k * groups // K for k in range(K)]))


def test_awq_by_hand() -> None:
    """Eight outputs, one input: the word 0x76543210 holds columns 0, 4, 1, 5, 2, 6, 3, 7 at those places."""
    tensors = {
        "qweight": int32([[0x76543210]]),
        "qzeros": int32([[0x11111111]]),
        "scales": torch.full((1, 8), 2.0, dtype=torch.float16),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": 1, "zero_point": True}
    assert read(config, tensors, (8, 1)).dequantize().flatten().tolist() == [-2.0, 6.0, 0.0, 8.0, 2.0, 10.0, 4.0, 12.0]


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
def test_block_fp8(name: str) -> None:
    weight = torch.randn(N, K).to(torch.float8_e4m3fn)
    rows, columns = 16, 40
    scale = torch.rand(math.ceil(N / rows), math.ceil(K / columns)) + 0.5
    scale[0, 0] *= -1
    expected = torch.zeros(N, K, dtype=torch.float64)
    for n in range(N):
        for k in range(K):
            expected[n, k] = float(weight[n, k].float()) * float(scale[n // rows, k // columns])
    config = {"quant_method": "fp8", "weight_block_size": [rows, columns], "activation_scheme": "dynamic"}
    check(read(config, {"weight": weight, name: scale}), expected)


@pytest.mark.parametrize("names", [("weight_scale_inv", "activation_scale"), ("weight_scale", "input_scale")])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_fp8_with_a_scale_a_tensor(names: tuple[str, str], static: bool, shape: tuple[int, ...]) -> None:
    """Ministral 3 has these names, and scalars; AutoFP8 has the others. The weight is that which transformers makes."""
    weight = torch.randn(N, K).to(torch.float8_e4m3fn)
    tensors = {"weight": weight, names[0]: torch.full(shape, -0.3)}
    config = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static" if static else "dynamic"}
    if static:
        tensors[names[1]] = torch.full(shape, 0.25)
    matrix = read(config, tensors)
    library = Fp8Dequantize(None).convert({"weight": weight, "weight_scale_inv": torch.tensor(-0.3)})
    assert matrix.dequantize().equal(library["weight"])
    assert matrix.inputs == (InputScales(static=0.25) if static else InputScales())
    assert matrix.activations == "fp8" and matrix.by_channel(torch.float8_e4m3fn) is not None
    if static:
        for scale in (0.0, -0.25, math.inf):
            with pytest.raises(ValueError, match=rf"tensor m\.{names[1]} is .*; the scale of inputs must be positive"):
                read(config, tensors | {names[1]: torch.full(shape, scale)})
    with pytest.raises(ValueError, match=f"m.{names[0]}"):
        read(config, tensors | {names[0]: torch.ones(2)})


def test_an_fp8_head_is_quantized_where_no_name_leaves_it_out_and_the_file_has_its_scale() -> None:
    stored = Stored({})
    stored["lm_head.weight"] = torch.ones(N, K).to(torch.float8_e4m3fn)
    given = {"quant_method": "fp8", "modules_to_not_convert": ["gate"]}
    assert checkpoint_format(given).matrix("lm_head", (N, K), stored) is None
    stored["lm_head.weight_scale_inv"] = torch.ones(())
    assert checkpoint_format(given).matrix("lm_head", (N, K), stored) is not None
    assert checkpoint_format({"quant_method": "fp8"}).matrix("lm_head", (N, K), stored) is None


def compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FP8 = {**INT8, "type": "float"}


@pytest.mark.parametrize(
    ("form", "weights"),
    [
        ("pack-quantized", {"num_bits": bits, "symmetric": symmetric, **strategy})
        for bits in (4, 8)
        for symmetric in (True, False)
        for strategy in ({"strategy": "channel"}, {"strategy": "group", "group_size": GROUP})
    ]
    + [
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
        ("int-quantized", {"num_bits": 8, "symmetric": False, "strategy": "channel"}),
        ("int-quantized", {"num_bits": 4, "strategy": "channel"}),
        ("int-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}),
        ("int-quantized", {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": GROUP}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 32]}),
    ],
)
def test_what_the_compressed_tensors_library_writes_is_read_as_it_reads_it(form: str, weights: dict[str, Any]) -> None:
    inputs = {"int-quantized": INT8, "float-quantized": FP8, "pack-quantized": None}[form]
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    weight = torch.randn(N, K)
    counts = {"tensor": (1,), "channel": (N, 1), "group": (N, K // GROUP), "block": (N // 8, K // 32)}[
        weights["strategy"]
    ]
    scale = (torch.rand(counts) * 0.02 + 0.02) * torch.randn(counts).sign()
    low = -8 if weights["num_bits"] == 4 else -128
    state = {"weight": weight, "weight_scale": scale}
    if not weights.get("symmetric", True):
        state["weight_zero_point"] = torch.randint(low, -low, counts, dtype=torch.int8)
    library = BaseCompressor.get_value_from_registry(form)
    tensors = library.compress(state, scheme)
    matrix = read(compressed(form, weights, inputs), tensors)
    check(matrix, library.decompress(tensors, scheme)["weight"].double())
    assert matrix.activations == {"int-quantized": "int8", "float-quantized": "fp8", "pack-quantized": "float"}[form]
    assert (matrix.by_channel() is not None) == (
        form != "float-quantized" and weights["strategy"] in ("tensor", "channel") and weights.get("symmetric", True)
    )
    if (stored := matrix.by_channel()) is not None:
        assert (stored[0] * stored[1][:, None]).equal(matrix.dequantize())
    assert matrix.bits == weights["num_bits"]


def test_four_bits_with_float8_inputs_are_read_unpacked() -> None:
    """W4AFP8 of llm-compressor: the library chooses the format by the types."""
    weights = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=FP8)
    form = infer_module_format(torch.nn.Linear, scheme).value
    assert form == "int-quantized"
    library = BaseCompressor.get_value_from_registry(form)
    tensors = library.compress({"weight": torch.randn(N, K), "weight_scale": torch.rand(N, K // GROUP) + 0.1}, scheme)
    matrix = read(compressed(form, weights, FP8), tensors)
    check(matrix, library.decompress(tensors, scheme)["weight"].double())
    assert (matrix.bits, matrix.activations) == (4, "fp8")
    tensors["weight"][3, 5] = 8
    with pytest.raises(ValueError, match=r"m\.weight holds numbers outside -8 to 7"):
        read(compressed(form, weights, FP8), tensors)


def test_a_groups_own_format_has_precedence_over_that_of_the_whole_config() -> None:
    config = compressed("pack-quantized", {"num_bits": 4, "strategy": "channel"}, INT8)
    assert checkpoint_format(config).group("m").format == "pack-quantized"  # type: ignore[attr-defined]
    config["format"] = "mixed-precision"
    config["config_groups"]["group_0"]["format"] = "int-quantized"
    assert checkpoint_format(config).group("m").format == "int-quantized"  # type: ignore[attr-defined]


@pytest.mark.parametrize("inputs", [INT8, FP8])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_static_input_scales_are_read(inputs: dict[str, Any], shape: tuple[int, ...]) -> None:
    weight = torch.randint(-8, 8, (N, K)).to(torch.int8 if inputs is INT8 else torch.float8_e4m3fn)
    form = "int-quantized" if inputs is INT8 else "float-quantized"
    tensors = {"weight": weight, "weight_scale": torch.ones(N, 1), "input_scale": torch.full(shape, 0.25)}
    weights = {"num_bits": 8, "type": inputs["type"], "strategy": "channel"}
    config = compressed(form, weights, {**inputs, "dynamic": False, "strategy": "tensor"})
    matrix = read(config, tensors)
    assert matrix.dequantize().equal(weight.float()) and matrix.inputs == InputScales(static=0.25)
    for scale in (0.0, -0.25, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"tensor m\.input_scale is .*; the scale of inputs must be positive"):
            read(config, tensors | {"input_scale": torch.full(shape, scale)})


def test_the_inputs_of_blocks_have_a_scale_for_each_group_of_columns() -> None:
    tensors = {"weight": torch.randn(N, K).to(torch.float8_e4m3fn), "weight_scale": torch.ones(N // 8, K // 32)}
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 32]}
    config = compressed("float-quantized", weights, {**FP8, "strategy": "group", "group_size": 32})
    assert read(config, tensors).inputs == InputScales(group=32)
    config = {"quant_method": "fp8", "weight_block_size": [8, 32], "activation_scheme": "dynamic"}
    assert read(config, tensors).inputs == InputScales(group=32)


def test_a_scale_of_a_whole_batch_is_replaced_and_named() -> None:
    config = compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}, {**INT8, "strategy": "tensor"})
    assert checkpoint_format(config).name.endswith("its inputs' scale of a whole batch replaced by per-token scales")


@pytest.mark.parametrize(
    "names",
    [
        ["k_scale", "v_scale"],
        ["kv_scale"],
        ["k_proj.output_scale", "v_proj.output_scale"],
        ["k_proj.k_scale", "v_proj.v_scale"],
    ],
)
def test_scales_of_keys_and_values_are_left_aside_and_named(names: list[str]) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    pack = {**PACK4, "ignore": ["re:.*"], "kv_cache_scheme": scheme}
    fp8 = {"quant_method": "fp8", "ignored_layers": ["m"], "kv_cache_scheme": "static"}
    for config in (pack, {**pack, "config_groups": {}}, fp8):
        form = checkpoint_format(config)
        stored = Stored({})
        for module in ("k_proj", "v_proj"):
            assert form.matrix(f"m.{module}", (N, K), stored) is None
        assert stored.used >= {f"m.{name}" for name in names}
        assert form.name.endswith("its kv_cache_scheme left aside")


def test_transforms_that_are_in_the_weights_need_nothing() -> None:
    """Read llm-compressor's first two rotations of SpinQuant; a third one acts when the model runs."""

    def transform(*places: str) -> dict[str, Any]:
        return {"type": "hadamard", "apply": [{"targets": ["re:.*"], "location": place} for place in places]}

    folded = TransformConfig(
        config_groups={"R1": transform("weight_output", "weight_input"), "R2": transform("weight_output")}
    ).model_dump(mode="json")
    assert checkpoint_format({**PACK4, "transform_config": folded}).name == checkpoint_format(PACK4).name
    for place in ("input", "output", "k_cache", "q_attn"):
        config = copy.deepcopy(folded)
        config["config_groups"]["R3"] = transform("weight_input", place)
        with pytest.raises(ValueError, match="transform_config has transforms that act when the model runs"):
            checkpoint_format({**PACK4, "transform_config": config})


def test_compressed_tensors_with_reordered_columns() -> None:
    q, z, scales = drawn(4, K // GROUP, symmetric=True)
    group_of = (np.random.default_rng(1).permutation(K) // GROUP).tolist()
    tensors = {
        "weight_packed": int32([words_of(q[n].tolist(), 4) for n in range(N)]),
        "weight_scale": torch.from_numpy(scales),
        "weight_shape": torch.tensor([N, K]),
        "weight_g_idx": torch.tensor(group_of, dtype=torch.int32),
    }
    config = compressed(
        "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP, "actorder": "group"}
    )
    check(read(config, tensors), one_by_one(q, z, scales, group_of))
    tensors["weight_g_idx"] = torch.full((K,), -1, dtype=torch.int32)
    check(read(config, tensors), one_by_one(q, z, scales, [k // GROUP for k in range(K)]))


def test_the_most_particular_target_wins_and_ignored_modules_stay() -> None:
    config = compressed("pack-quantized", {"num_bits": 4, "strategy": "channel"})
    groups = config["config_groups"]
    groups["group_1"] = {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8, "strategy": "channel"}}
    groups["group_2"] = {"targets": ["b.down_proj"], "weights": {"num_bits": 8, "strategy": "tensor"}}
    form = checkpoint_format({**config, "ignore": ["lm_head", "re:.*k_proj"]})
    assert [form.group(m).bits for m in ("a.q_proj", "a.down_proj")] == [4, 8]  # type: ignore[attr-defined]
    assert form.group("b.down_proj").strategy == "tensor"  # type: ignore[attr-defined]
    assert form.group("lm_head") is None and form.group("a.k_proj") is None  # type: ignore[attr-defined]


GPTQ4 = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}
AWQ4 = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
PACK4 = compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "hqq"}, "quant_method is 'hqq'; supported are compressed-tensors"),
        ([], "quantization_config is a list"),
        ({**GPTQ4, "bits": 3}, "bits is 3; GPTQ is read with 4 or 8 bits"),
        ({**GPTQ4, "bits": "four"}, "bits is 'four'; it must be a whole number"),
        ({**GPTQ4, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({**GPTQ4, "dynamic": ["-:.*"]}, "dynamic is ['-:.*']; expected an object of objects"),
        ({**GPTQ4, "dynamic": {"+:(": {}}}, "dynamic: '+:(' is not a regular expression"),
        ({**GPTQ4, "dynamic": {".*": {"bits": 2}}}, "dynamic: .*: bits is 2; GPTQ is read with 4 or 8 bits"),
        ({**GPTQ4, "dynamic": {".*": {"adapter": "a"}}}, "dynamic: .*: not supported: adapter"),
        ({**GPTQ4, "modules_in_block_to_quantize": "q_proj"}, "modules_in_block_to_quantize is 'q_proj'"),
        ({**GPTQ4, "pack_dtype": "int8"}, "pack_dtype is 'int8'; supported: int32"),
        ({**AWQ4, "version": "gemv"}, "version is 'gemv'; supported: gemm"),
        ({**AWQ4, "bits": 8}, "bits is 8; AWQ is read with 4 bits"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size is 128; expected two whole numbers"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}, "activation_scheme"),
        ({"quant_method": "fp8", "activation_scheme": "token"}, "activation_scheme is 'token'; supported: dynamic"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'; supported: e4m3"),
        ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0'; supported: float"),
        ({"quant_method": "fp8", "modules_to_convert": ["embed"]}, "not supported: modules_to_convert"),
        ({**PACK4, "format": "marlin-24"}, "format is 'marlin-24'; supported are pack-quantized"),
        ({**PACK4, "config_groups": {}}, "config_groups is {}"),
        ({**PACK4, "transform_config": {"a": 1}}, "transform_config has transforms that act when the model runs"),
        ({**PACK4, "kv_cache_scheme": "fp8"}, "kv_cache_scheme is 'fp8'; expected an object"),
        ({**PACK4, "ignore": ["re:("]}, "is not a regular expression"),
        (compressed("pack-quantized", {"num_bits": 3, "strategy": "channel"}), "weights of 3 bits"),
        (compressed("pack-quantized", {"num_bits": 4, "strategy": "tensor_group"}), "strategy is 'tensor_group'"),
        (compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": -5}), "group_size is -5"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoint_format(config)


def plain_gptq() -> dict[str, Tensor]:
    return {
        "qweight": torch.zeros(K // 8, N, dtype=torch.int32),
        "qzeros": torch.zeros(K // GROUP, N // 8, dtype=torch.int32),
        "scales": torch.ones(K // GROUP, N, dtype=torch.float16),
        "g_idx": torch.arange(K, dtype=torch.int32) // GROUP,
    }


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        (
            "scales",
            torch.zeros(K // GROUP, N, dtype=torch.float16),
            "tensor m.scales has a scale that is zero or not finite",
        ),
        ("scales", torch.full((K // GROUP, N), float("nan")), "tensor m.scales has a scale that is zero or not finite"),
        ("scales", torch.full((K // GROUP, N), -math.inf), "tensor m.scales has a scale that is zero or not finite"),
        ("scales", torch.ones(1, N), "m.scales"),
        ("qweight", torch.zeros(K // 8 - 1, N, dtype=torch.int32), "m.qweight"),
        ("qweight", torch.zeros(K // 8, N), "m.qweight"),
        ("g_idx", torch.full((K,), K // GROUP, dtype=torch.int32), "tensor m.g_idx names groups outside 0 to 2"),
        ("g_idx", torch.full((K,), -1, dtype=torch.int32), "tensor m.g_idx names groups outside 0 to 2"),
        ("g_idx", torch.zeros(K), "m.g_idx"),
    ],
)
def test_damaged_tensors_are_named(name: str, broken: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(GPTQ4, plain_gptq() | {name: broken})


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="m: group_size 36 does not divide its 96 columns"):
        read({**GPTQ4, "group_size": 36}, plain_gptq())
    with pytest.raises(ValueError, match="m: a matrix of 20 x 96 cannot be packed as 4-bit numbers"):
        read(GPTQ4, plain_gptq(), (20, K))


def test_autoawq_leaves_out_more_modules_than_transformers_and_the_file_decides() -> None:
    """AutoAWQ finds a name anywhere in a module's."""
    form = checkpoint_format({**AWQ4, "modules_to_not_convert": ["gate"]})
    q, z, scales = drawn(4, K // GROUP, symmetric=False)
    stored = Stored(awq_tensors(q, z, scales))
    for module in ("mlp.gate", "mlp.gate_proj", "lm_head"):
        assert form.matrix(module, (N, K), stored) is None
    for name in ("qweight", "qzeros", "scales"):
        stored[f"mlp.gate_proj.{name}"] = stored[f"m.{name}"]
    assert form.matrix("mlp.gate_proj", (N, K), stored) is not None


@pytest.mark.parametrize("config", [AWQ4, {**GPTQ4, "bits": 8}])
def test_fields_that_are_not_known_are_refused_by_name(config: dict[str, Any]) -> None:
    told = {"damp_percent": 0.01, "meta": {"quantizer": ["gptqmodel:7.7.0"]}, "rotation": None, "activation": {}}
    told |= {"data_type": "int", "to_quant_block_names": "model.layers", "provider": "auto-round", "amp": False}
    assert checkpoint_format({**config, **told}).name == checkpoint_format(config).name
    with pytest.raises(ValueError, match="data_type is 'nv_fp'; supported: int"):
        checkpoint_format({**config, "data_type": "nv_fp"})
    with pytest.raises(ValueError, match="not supported: rotation; take another"):
        checkpoint_format({**config, "rotation": "hadamard"})
