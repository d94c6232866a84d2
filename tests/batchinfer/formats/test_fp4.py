"""NVFP4, MXFP4 and MXFP8 beside the compressed-tensors library."""

import copy
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from quantized_models import FORMATS, fp4
from stored import K, N, Stored, read
from torch import Tensor

from batchinfer.formats.fp4 import E2M1
from batchinfer.formats.matrix import UNROUNDED
from batchinfer.formats.registry import checkpoint_format, refuse_on_gpu

PRESETS = {"nvfp4": "NVFP4", "nvfp4a16": "NVFP4A16", "mxfp4": "MXFP4A16"}


def written(form: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """(config, stored tensors, what they stand for), with a group that is nearly zero."""
    config, write = fp4(PRESETS[form])
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    weight[1, :32] *= 1e-9
    return config, *write(weight)


@pytest.mark.parametrize(
    ("form", "group", "inputs"), [("nvfp4", 16, "nvfp4"), ("nvfp4a16", 16, "float"), ("mxfp4", 32, "float")]
)
def test_the_numbers_are_those_of_the_library(form: str, group: int, inputs: str) -> None:
    config, tensors, expected = written(form)
    matrix = read(config, tensors)
    assert matrix.dequantize().equal(expected)
    library = BaseCompressor.get_value_from_registry(config["format"])
    scheme = preset_name_to_scheme(PRESETS[form], ["Linear"])
    assert matrix.dequantize().bfloat16().equal(library.decompress(tensors, scheme)["weight"].bfloat16())
    assert (matrix.bits, matrix.block, matrix.activations) == (4, (1, group), inputs)
    assert matrix.by_channel() is None and matrix.by_group((group,)) is None
    assert matrix.dequantize().equal(matrix.to(torch.device("cpu")).dequantize())


def test_each_number_of_4_bits() -> None:
    """The sixteen numbers of the standard, as torch writes them in its own type of 4 bits."""
    octets = torch.arange(0, 256, 17, dtype=torch.uint8)  # both halves are the same number
    tensors = {
        "weight_packed": octets.repeat_interleave(16)[None],
        "weight_scale": torch.full((1, 16), 128, dtype=torch.uint8),
    }
    weight = read(FORMATS["mxfp4"][0], tensors, (1, 512)).dequantize()
    halves = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert weight.view(16, 32)[:, 0].equal(2 * torch.cat((halves, -halves)))
    assert E2M1.abs().max() == 6


def test_mxfp8() -> None:
    scheme = preset_name_to_scheme("MXFP8", ["Linear"])
    library = BaseCompressor.get_value_from_registry("mxfp8-quantized")
    powers = torch.exp2(torch.randint(-12, 12, (N, K // 32)).float())
    tensors = library.compress({"weight": torch.randn(N, K), "weight_scale": powers}, scheme)
    group = {**scheme.model_dump(mode="json"), "format": "mxfp8-quantized"}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    matrix = read(config, tensors)
    assert matrix.dequantize().equal(library.decompress(tensors, scheme)["weight"].float())
    assert matrix.activations == "mxfp8"
    assert not checkpoint_format(config).eight_bit_inputs and not checkpoint_format(config).for_cpu_alone


@pytest.mark.parametrize(
    ("form", "name", "broken", "message"),
    [
        ("mxfp4", "weight_scale", torch.full((N, K // 32), 255, dtype=torch.uint8), "has a scale that is not a number"),
        ("mxfp4", "weight_scale", torch.ones(N, K // 16, dtype=torch.uint8), r"m\.weight_scale"),
        ("mxfp4", "weight_packed", torch.ones(N, K, dtype=torch.uint8), r"m\.weight_packed"),
        ("nvfp4", "weight_packed", torch.ones(N, K // 2, dtype=torch.int8), r"m\.weight_packed"),
        ("nvfp4", "weight_scale", torch.ones(N, K // 16), r"m\.weight_scale"),
        ("nvfp4", "weight_global_scale", torch.zeros(1), "weight_global_scale has a scale that is zero"),
        ("nvfp4", "weight_global_scale", torch.ones(2), r"m\.weight_global_scale"),
    ],
)
def test_damaged_tensors_are_named(form: str, name: str, broken: Tensor, message: str) -> None:
    config, tensors, _ = written(form)
    with pytest.raises(ValueError, match=message):
        read(config, tensors | {name: broken})


def test_rows_that_groups_do_not_divide_are_refused() -> None:
    for form, size in (("nvfp4", 16), ("mxfp4", 32)):
        with pytest.raises(ValueError, match=f"m: group_size {size} does not divide its 40 columns"):
            checkpoint_format(FORMATS[form][0]).matrix("m", (N, 40), Stored({}))


@pytest.mark.parametrize(
    ("form", "field", "value", "message"),
    [
        ("nvfp4", "group_size", 32, "group_size is 32; in nvfp4-pack-quantized it must be 16"),
        ("mxfp4", "group_size", 16, "group_size is 16; in mxfp4-pack-quantized it must be 32"),
        ("nvfp4", "strategy", "group", "strategy is 'group'; supported in nvfp4-pack-quantized: tensor_group"),
        ("nvfp4", "num_bits", 8, "weights of 8 bits and type 'float' in nvfp4-pack-quantized are not supported"),
        ("mxfp4", "symmetric", False, "floating-point weights with a zero point are not supported"),
        ("mxfp4", "rotation", "hadamard", "group_0: weights: not supported: rotation"),
    ],
)
def test_other_settings_are_refused_by_name(form: str, field: str, value: Any, message: str) -> None:
    config = copy.deepcopy(FORMATS[form][0])
    config["config_groups"]["group_0"]["weights"][field] = value
    with pytest.raises(ValueError, match=message):
        checkpoint_format(config)


def test_what_has_no_kernel_is_refused_on_a_gpu() -> None:
    for form in ("nvfp4", "mxfp4"):
        with pytest.raises(
            ValueError, match=f"{form}-pack-quantized 4 bits, for which there is no kernel on a GPU yet"
        ):
            refuse_on_gpu(checkpoint_format(FORMATS[form][0]))
    for form in ("fp8-tensor", "pack", "awq", "gptq", "w4afp8"):
        refuse_on_gpu(checkpoint_format(FORMATS[form][0]))
    refuse_on_gpu(None)
    assert "nvfp4" in UNROUNDED
