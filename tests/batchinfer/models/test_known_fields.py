"""Fields of config.json that are missing, null, unknown, or of another family, against transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engines import assert_logits_of_transformers, compare_logits, engine_of
from families import made

from batchinfer.models.config import FAMILIES, ModelConfig, parse_model_config
from batchinfer.models.known_fields import _DEFAULTS

# Sizes that fit every family's default for the others.
FULL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-4,
    "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 5e5},
    "tie_word_embeddings": True,
}  # fmt: skip
OF_A_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "internlm3": {"attention_bias": False, "mlp_bias": False},  # transformers wants the two alike
    "iquestcoder": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 24},
    "ministral": {
        "sliding_window": 24, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "cwm": {
        "sliding_window": 24, "mlp_bias": True,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "qwen2": {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1, "attention_bias": True},
}  # fmt: skip


def shape(config: ModelConfig) -> dict[str, Any]:
    return {
        "tensors": dict(config.tensors()),
        "windows": list(config.windows),
        "eps": config.norm_eps,
        "frequencies": config.layers[0].attention.rope.frequencies(),
        "scale": config.layers[0].attention.rope.attention_factor,
    }


def shape_in_transformers(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(raw))
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config)
    tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    everywhere = config.sliding_window if config.model_type == "mistral" else None
    return {
        "tensors": tensors,
        "windows": [getattr(layer.self_attn, "sliding_window", everywhere) for layer in model.model.layers],
        "eps": model.model.norm.variance_epsilon,
        "frequencies": model.model.rotary_emb.inv_freq,
        "scale": model.model.rotary_emb.attention_scaling,
    }


@pytest.mark.parametrize("family", OF_A_FAMILY)
def test_a_field_that_is_missing_or_null_has_the_value_it_has_in_transformers(family: str, tmp_path: Path) -> None:
    """Each field that is read, one at a time. Where one of the two refuses the file, there is nothing to compare."""
    full = {"model_type": family, **FULL, **OF_A_FAMILY[family]}
    read = (_DEFAULTS | FAMILIES[family].DEFAULTS).keys() - {"quantization_config"}
    assert FULL.keys() | OF_A_FAMILY[family].keys() <= read
    compared = set()
    for key in read:
        for raw in ({k: v for k, v in full.items() if k != key}, {**full, key: None}):
            try:
                ours = shape(parse_model_config(raw))
                expected = shape_in_transformers(raw, tmp_path)
            except Exception:
                continue
            compared.add(key)
            torch.testing.assert_close(ours.pop("frequencies"), expected.pop("frequencies"), rtol=1e-6, atol=0)
            assert ours == expected, key
    required = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    # Refused by one of the two: what has no default here, and the defaults of "cwm" for all layers.
    assert read - compared <= required | {"max_position_embeddings", "layer_types", "rope_parameters", "head_dim"}


OTHERS = sorted(FAMILIES.keys() - OF_A_FAMILY.keys())
# What one of the two takes only together with other fields.
NOT_COMPARED = {
    "gemma3_text": {
        "rope_local_base_freq",
        "num_attention_heads",
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "num_hidden_layers",
    },
    "gemma4_text": {"num_hidden_layers", "vocab_size"},
    "gemma4_unified_text": {"num_hidden_layers"},
    "granitemoehybrid": {"layers_block_type", "num_local_experts"},
    "helium": {"head_dim"},
    "qwen3_5_moe_text": {"linear_num_key_heads"},
    "qwen3_5_text": {"linear_num_key_heads"},
    "qwen3_next": {"linear_num_key_heads", "num_experts"},
    "exaone_moe": {"n_group"},
    "glm4_moe": {"n_group"},
    "solar_open": {"n_group"},
    "qwen2_moe": {"use_sliding_window"},
    # These have no default.
    "dots1": {"n_group", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"},
}
# Numbers of experts that allow transformers' default number of chosen ones.
EXPERTS: dict[str, dict[str, int]] = {
    "dots1": {"n_routed_experts": 16},
    "ernie4_5_moe": {"moe_num_experts": 7},
    "exaone_moe": {"num_experts": 32},
    "flex_olmo": {"num_experts": 5},
    "glm4_moe": {"n_routed_experts": 32},
    "solar_open": {"n_routed_experts": 32},
    "mellum": {"num_local_experts": 8},
    "minimax_m2": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8},
    "qwen3_moe": {"num_experts": 8},
    "qwen3_5_moe_text": {"num_experts": 8},
    "qwen3_next": {"num_experts": 10},
}


@pytest.mark.parametrize("family", OTHERS)
def test_a_field_of_a_family_has_its_default_when_it_is_left_out(
    make_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """Missing, or null, by the logits. Where one of the two refuses the file, there is nothing to compare."""
    full = json.loads((made(make_model, family, **EXPERTS.get(family, {})) / "config.json").read_text())
    own = FAMILIES[family].DEFAULTS.keys() - NOT_COMPARED.get(family, set())
    compared, known = set(), set[str]()
    for key in own:
        for number, raw in enumerate(({k: v for k, v in full.items() if k != key}, {**full, key: None})):
            folder = tmp_path / f"{key}-{number}"
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(raw))
            try:
                ours = parse_model_config(raw)
            except ValueError:
                continue
            try:
                config = transformers.AutoConfig.from_pretrained(folder)
                if (both := f"{ours} {config}") in known:  # both models are those of a file that was compared
                    compared.add(key)
                    continue
                known.add(both)
                oracle = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            except Exception:
                continue
            for name, parameter in oracle.named_parameters():
                torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
            oracle.save_pretrained(folder)
            (folder / "config.json").write_text(json.dumps(raw))
            prompt = [list(range(2, 72))]
            for found, expected in compare_logits(engine_of(folder), oracle, prompt):
                assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), (key, raw.get(key))
            compared.add(key)
    assert own - compared <= {"num_key_value_heads"}  # whose default may not divide the heads here


# Fields of public checkpoints that no code of these families reads, and fields of some family that another ignores.
HARMLESS = {
    "is_llama_config": True, "unsloth_fixed": True, "unsloth_version": "2025.3.1", "neftune_noise_alpha": 5,
    "transformers.js_config": {"dtype": "q4"}, "transformers_js_config": {"dtype": "q4"}, "activation": "swiglu",
    "use_mrope": True, "temperature": 0.6,
}  # fmt: skip
OF_OTHERS = {
    "llama": {"max_window_layers": 1},
    "mistral": {"attention_bias": True, "mlp_bias": True, "use_sliding_window": True},
    "qwen2": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"mlp_bias": True},
}


@pytest.mark.parametrize("family", OF_OTHERS)
def test_fields_that_transformers_does_not_read_are_noted(
    make_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    model = shutil.copytree(make_model(family), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    for key in OF_OTHERS[family]:
        config.pop(key, None)
    (model / "config.json").write_text(json.dumps(config | HARMLESS | OF_OTHERS[family] | {"rope_interleaved": False}))
    assert_logits_of_transformers(model)
    names = ", ".join(HARMLESS | OF_OTHERS[family])
    assert f"fields of config.json that are not read, as in transformers: {names}" in engine_of(model).stats().notes


def test_positions_of_images_do_not_matter_for_text(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = shutil.copytree(make_model("qwen3"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] |= {"mrope_section": [2, 3, 3], "mrope_interleaved": True}
    (model / "config.json").write_text(json.dumps(config))
    assert_logits_of_transformers(model)
