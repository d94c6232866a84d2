"""gpt-oss's MXFP4 beside transformers' own reader, and damaged tensors of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import compare_logits, engine_of
from families import made
from fused_experts import write
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from batchinfer.formats.mxfp4 import MXFP4
from batchinfer.formats.registry import checkpoint_format, refuse_on_gpu
from batchinfer.formats.scheme import weight_scheme
from batchinfer.quantize.methods import method
from batchinfer.quantize.walk import Quantizer

MODULE = "model.layers.0.mlp.experts.down_proj"


class Stored:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def has(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def take(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        tensor = self.tensors[name]
        assert tuple(tensor.shape) == shape and tensor.dtype in dtypes
        return tensor

    def drop(self, name: str) -> None:
        raise AssertionError


def packed(experts: int = 3, rows: int = 8, columns: int = 96) -> dict[str, Tensor]:
    return {
        f"{MODULE}_blocks": torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8),
        f"{MODULE}_scales": torch.randint(110, 132, (experts, rows, columns // 32), dtype=torch.uint8),
    }


def test_numbers_are_those_of_transformers() -> None:
    tensors = packed()
    expected = convert_moe_packed_tensors(*(tensor.clone() for tensor in tensors.values()), dtype=torch.float32)
    assert expected.shape == (3, 96, 8)  # transformers multiplies from the other side
    form = checkpoint_format({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    for expert, numbers in enumerate(expected):
        stored = Stored({name: tensor[expert] for name, tensor in tensors.items()})
        found = form.matrix(MODULE, (8, 96), stored)
        assert found is not None and form.matrix("lm_head", (8, 96), stored) is None
        assert found.dequantize().equal(numbers.t())


def test_blocks_that_do_not_fill_the_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="down_proj has 95 columns, which blocks of 32 do not fill"):
        MXFP4({}).matrix(MODULE, (8, 95), Stored(packed()))


def test_a_scale_that_is_no_number_is_refused() -> None:
    tensors = {name: tensor[1] for name, tensor in packed().items()}
    tensors[f"{MODULE}_scales"][2, 0] = 255
    with pytest.raises(ValueError, match="_scales has a scale that is not a number"):
        MXFP4({}).matrix(MODULE, (8, 96), Stored(tensors))


def test_it_is_refused_on_a_gpu() -> None:
    with pytest.raises(ValueError, match="the checkpoint is MXFP4, for which there is no kernel on a GPU yet"):
        refuse_on_gpu(MXFP4({}))


@pytest.fixture
def published(make_model: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """(gpt-oss as it is published, the same in floating point, as transformers expands it)."""
    model = made(make_model, "gpt_oss")
    tensors = load_file(model / "model.safetensors")
    stored: dict[str, Any] = dict(tensors)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors[name].shape
        parts = packed(experts, rows, columns)
        blocks, scales = (tensor for tensor in parts.values())
        scales.sub_(8)  # numbers of about 0.1
        tensors[name] = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)
        del stored[name]
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    plain, folder = (write(found, tmp_path / name, model) for name, found in (("plain", tensors), ("mxfp4", stored)))
    raw = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder, plain


def test_a_model_computes_with_it_what_it_computes_with_its_numbers(published: tuple[Path, Path]) -> None:
    model, plain = published
    oracle = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    for ours, expected in compare_logits(engine_of(model, quantization="none"), oracle, [list(range(2, 90))]):
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_quantizing_it_is_quantizing_its_numbers(published: tuple[Path, Path], tmp_path: Path) -> None:
    sequences = [np.arange(2, 90, dtype=np.int32)]
    found = []
    for model in published:
        output = tmp_path / f"{model.name}-quantized"
        quantizer = Quantizer(model, output, weight_scheme("w4a16", 32), method("gptq"), sequences)
        assert len(list(quantizer.run())) == 4
        quantizer.finish("# A card\n")
        assert json.loads((output / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
        found.append({name: t for file in output.glob("*.safetensors") for name, t in load_file(file).items()})
    ours, expected = found
    assert ours.keys() == expected.keys() and "model.layers.0.mlp.experts.3.up_proj.weight_packed" in ours
    assert all(tensor.equal(expected[name]) for name, tensor in ours.items())


def test_damaged_blocks_are_refused(published: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = published
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj_blocks"
    for change, words in (
        (tensors[name][:3], "cannot be read"),
        (tensors[name][..., :2, :], r"experts.0.gate_proj_blocks has shape \[64, 2, 16\]; config.json asks for"),
        (torch.zeros((), dtype=torch.uint8), "cannot be read"),
    ):
        save_file({**tensors, name: change.contiguous()}, model / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=words):
            engine_of(model)
        with pytest.raises(ValueError, match=r"tensor model\.layers\.1\.mlp\.experts"):
            Quantizer(model, tmp_path / "out", weight_scheme("w4a16", 32), method("rtn"))
