"""gpt-oss's MXFP4 beside transformers' own reader, and damaged tensors of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from batchinfer.formats.mxfp4 import MXFP4
from batchinfer.formats.registry import checkpoint_format, refuse_on_gpu

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
    found = form.matrix(MODULE, (24, 96), Stored(tensors))
    assert found is not None and form.matrix("lm_head", (24, 96), Stored(tensors)) is None
    assert found.dequantize().view(3, 8, 96).equal(expected.transpose(1, 2))


@pytest.mark.parametrize("shape", [(24, 64), (25, 96), (24, 95)])
def test_other_shapes_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"down_proj_blocks has shape \[3, 8, 3, 16\]; config.json asks for"):
        MXFP4({}).matrix(MODULE, shape, Stored(packed()))


def test_a_scale_that_is_no_number_is_refused() -> None:
    tensors = packed()
    tensors[f"{MODULE}_scales"][1, 2, 0] = 255
    with pytest.raises(ValueError, match="_scales has a scale that is not a number"):
        MXFP4({}).matrix(MODULE, (24, 96), Stored(tensors))


def test_it_is_refused_on_a_gpu() -> None:
    with pytest.raises(ValueError, match="the checkpoint is MXFP4, for which there is no kernel on a GPU yet"):
        refuse_on_gpu(MXFP4({}))


def test_a_model_computes_with_it_what_it_computes_with_its_numbers(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    import json

    from engines import compare_logits, engine_of
    from families import CASES
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    family, changes = CASES["gpt_oss"]
    model = make_model(family, tie_word_embeddings=False, pad_token_id=None, **changes)
    tensors = load_file(model / "model.safetensors")
    names = [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    published: dict[str, Any] = dict(tensors)
    for name in names:
        experts, columns, rows = tensors[name].shape
        parts = packed(experts, rows, columns)
        blocks, scales = (tensor for tensor in parts.values())
        scales.sub_(8)  # numbers of about 0.1
        tensors[name] = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32).contiguous()
        del published[name]
        published |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    for folder, found in ((tmp_path / "numbers", tensors), (tmp_path / "mxfp4", published)):
        folder.mkdir()
        save_file(found, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    raw = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "mxfp4" / "config.json").write_text(json.dumps(raw))
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "numbers", dtype=torch.float32).eval()
    engine = engine_of(tmp_path / "mxfp4", quantization="none")
    for ours, expected in compare_logits(engine, oracle, [list(range(2, 90))]):
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
