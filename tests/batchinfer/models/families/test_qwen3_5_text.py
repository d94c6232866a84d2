"""Qwen3.5: layers that predict several tokens are left aside, and what is not supported is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_logits_of_transformers
from families import QWEN_3_5
from safetensors.torch import load_file, save_file

from batchinfer.formats.scheme import weight_scheme
from batchinfer.models.config import parse_model_config
from batchinfer.models.weights import SafetensorsWeights
from batchinfer.quantize.methods import method
from batchinfer.quantize.walk import Quantizer


@pytest.fixture
def with_more_tokens(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint with layers that predict several tokens, as the Hub's have them."""
    model = shutil.copytree(make_model("qwen3_5_text", full_attention_interval=3, **QWEN_3_5), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors |= {"mtp.fc.weight": torch.ones(96, 192), "mtp.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    raw = json.loads((model / "config.json").read_text())
    hub = {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1}
    (model / "config.json").write_text(json.dumps(raw | hub))
    return model


def test_layers_that_predict_several_tokens_are_left_aside(with_more_tokens: Path) -> None:
    assert_logits_of_transformers(with_more_tokens)
    weights = SafetensorsWeights(with_more_tokens)
    with pytest.raises(ValueError, match="tensors that the model does not use"):
        weights.finish()


def test_they_stay_in_a_quantized_checkpoint(with_more_tokens: Path, tmp_path: Path) -> None:
    quantizer = Quantizer(with_more_tokens, tmp_path / "out", weight_scheme("w8a8-int8", None), method("rtn"))
    assert len(list(quantizer.run())) == 4
    quantizer.finish("# A card\n")
    assert "mtp.fc.weight" in SafetensorsWeights(tmp_path / "out").names()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layer_types": ["linear_attention"] * 3}, "layer_types has no full_attention"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types must name full_attention or linear_attention for 3"),
        ({"linear_num_key_heads": 3}, "linear_num_value_heads 4 is not a multiple of linear_num_key_heads 3"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1; it must be at least 2"),
        ({"attn_output_gate": False}, "attn_output_gate is False; supported is True"),
        ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype is 'bfloat16'; supported is 'float32'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
        ({"linear_key_head_dim": -4}, "linear_key_head_dim is -4; it must be a whole number from 1"),
    ],
)
def test_what_is_not_supported_is_named(make_model: Callable[..., Path], fields: dict[str, Any], words: str) -> None:
    raw = json.loads((make_model("qwen3_5_text", full_attention_interval=3, **QWEN_3_5) / "config.json").read_text())
    with pytest.raises(ValueError, match=words):
        parse_model_config({**raw, **fields})
