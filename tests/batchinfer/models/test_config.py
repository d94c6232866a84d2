"""Reading config.json: fields that are accepted, fields that are refused, and RoPE against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from batchinfer.models.config import ModelConfig, parse_model_config, read_model_config

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def parse(**changes: Any) -> ModelConfig:
    return parse_model_config({**BASE, **changes})


SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 20.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "truncate": False,
    },
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s['rope_type']}-{s.get('factor', 1)}")
def test_rope_frequencies_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    parameters = {**scaling, "rope_theta": 500000.0}
    oracle = transformers.LlamaConfig(**{**BASE, "rope_parameters": parameters})
    ours = parse(rope_parameters=parameters).attentions[0].rope
    if scaling["rope_type"] == "default":
        expected = 1.0 / 500000.0 ** (torch.arange(0, 16, 2).float() / 16)
        factor = 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](oracle, torch.device("cpu"))
    torch.testing.assert_close(ours.frequencies(), expected, rtol=1e-6, atol=0)
    assert ours.attention_factor == pytest.approx(factor)


@pytest.mark.parametrize("scaling", SCALINGS[1:], ids=lambda s: f"{s['rope_type']}-{s.get('factor', 1)}")
def test_rope_scaling_as_older_checkpoints_write_it(scaling: dict[str, Any]) -> None:
    older = {("type" if k == "rope_type" else k): v for k, v in scaling.items()}
    new = parse(rope_parameters={**scaling, "rope_theta": 500000.0})
    assert parse(rope_scaling=older, rope_theta=500000.0).attentions[0].rope == new.attentions[0].rope


def test_windows_by_family() -> None:
    assert parse(model_type="mistral", sliding_window=40).windows == (40,) * 3
    assert parse(model_type="mistral", sliding_window=None).windows == (None,) * 3
    assert parse(model_type="qwen2", sliding_window=40, max_window_layers=1).windows == (None,) * 3
    used = {"model_type": "qwen2", "sliding_window": 40, "use_sliding_window": True}
    assert parse(**used, max_window_layers=1).windows == (None, 40, 40)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert parse(**used, layer_types=kinds).windows == (40, None, 40)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def test_rope_parameters_and_rope_scaling_must_say_the_same() -> None:
    """transformers takes rope_scaling then, and loses the rope_theta that is only in rope_parameters."""
    with pytest.raises(ValueError, match=r"rope_parameters \{.*'default'.*\} and rope_scaling \{.*'yarn'.*\}, which"):
        parse(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rope_scaling=YARN)
    with pytest.raises(ValueError, match="which say different things"):
        parse(rope_parameters={**YARN, "rope_theta": 5e5}, rope_scaling=YARN)
    both = parse(rope_parameters={**YARN, "rope_theta": 5e5}, rope_scaling=YARN, rope_theta=5e5)
    assert both.attentions[0].rope == parse(rope_scaling=YARN, rope_theta=5e5).attentions[0].rope
    assert (
        parse(rope_parameters=YARN, rope_scaling=None).attentions[0].rope
        == parse(rope_parameters=YARN, rope_scaling={}).attentions[0].rope
    )


def test_original_positions_beside_rope_come_first() -> None:
    parameters = {**YARN, "rope_theta": 5e5}
    oracle = transformers.LlamaConfig(**{**BASE, "rope_parameters": parameters, "original_max_position_embeddings": 64})
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](oracle, torch.device("cpu"))
    ours = parse(rope_parameters=parameters, original_max_position_embeddings=64).attentions[0].rope
    torch.testing.assert_close(ours.frequencies(), expected, rtol=1e-6, atol=0)


def test_a_head_dim_that_is_not_hidden_over_heads() -> None:
    assert parse(head_dim=32).attentions[0].head_dim == 32
    assert parse().attentions[0].head_dim == 16
    assert parse(model_type="qwen3").attentions[0].head_dim == 128


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4"),
        ({"hidden_size": 97}, "hidden_size 97"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"vocab_size": 1 << 40}, "vocab_size is 1099511627776"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "short_factor is None; expected 8 positive numb"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "wobble": 1}}, "'wobble'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling has no factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": None}}, "rope_scaling: factor is null"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}},
            "rope_parameters has RoPE for each type of layer (full_attention, sliding_attention)",
        ),
        ({"sliding_window": 40}, "sliding_window is 40; supported is null"),
        ({"is_causal": False}, "is_causal is False; supported is True"),
        ({"model_type": "internlm3", "qkv_bias": True}, "qkv_bias is True; supported is False"),
        ({"model_type": "phi", "hidden_act": "tanh"}, "hidden_act is 'tanh'; supported are silu, "),
        ({"model_type": "phi", "hidden_act": ["gelu"]}, "hidden_act is ['gelu']; supported are silu, "),
        ({"model_type": "stablelm", "num_key_value_heads": 2, "head_dim": 32}, "head_dim is 32; for this model_type"),
        ({"model_type": "olmo", "clip_qkv": -8}, "clip_qkv is -8; it must be a positive number"),
        ({"model_type": "cohere", "logit_scale": None}, "logit_scale is null"),
        ({"model_type": "granite_swa"}, "model_type is 'granite_swa'; supported are"),
        ({"model_type": "hunyuan_v1_dense", "use_qk_norm": False}, "use_qk_norm is False; supported is True"),
        (
            {"model_type": "hunyuan_v1_dense", "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "wobble": 1}},
            "rope_scaling has a field 'wobble'",
        ),
        ({"model_type": "hunyuan_v1_dense", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"model_type": "gemma3", "text_config": {"model_type": "g3"}}, "wraps a language model of type 'g3'"),
        ({"residual_multiplier": 0.22}, "residual_multiplier is 0.22"),
        ({"auto_map": {"AutoModel": "m.M"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window is -1"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json") as error:
        parse(**changes)
    assert words in str(error.value)


def test_what_changes_nothing_is_read_past() -> None:
    assert parse(use_cache=True, torch_dtype="bfloat16", _name_or_path="x", new_flag=False).dtype == "bfloat16"


def test_an_adapter_beside_a_model_is_not_left_out_in_silence(tmp_path: Path) -> None:
    """Transformers applies it, if peft is installed; a folder with an adapter alone is no model."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"holds an adapter .* never applied: merge it into its model"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    with pytest.raises(ValueError, match="holds an adapter"):
        read_model_config(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert read_model_config(tmp_path) == parse()
