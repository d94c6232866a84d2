"""Checkpoints that wrap a language model: its logits are those of transformers for the whole, given text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engines import EDGES, compare_logits, engine_of
from families import GEMMA_4, SHARING
from safetensors.torch import load_file, save_file

from batchinfer.engine.engine import Engine
from batchinfer.formats.scheme import weight_scheme
from batchinfer.models.config import parse_model_config, read_model_config
from batchinfer.quantize.methods import method
from batchinfer.quantize.walk import Quantizer
from batchinfer.text.tokenizer_files import end_of_text_ids

TEXT = {
    "vocab_size": 320, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
PLAIN_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
SECTIONS = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({"model_type": "gemma3_text", "head_dim": 24, "query_pre_attn_scalar": 40}, PLAIN_VISION),
    "gemma4": (
        {"model_type": "gemma4_text", **GEMMA_4, **SHARING},
        {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 64,
        },
    ),
    "gemma4_unified": (
        {"model_type": "gemma4_unified_text", **GEMMA_4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        {"patch_size": 4, "mm_embed_dim": 96, "mm_posemb_size": 16, "output_proj_dims": 96},
    ),
    "internvl": ({"model_type": "qwen3", "head_dim": 16}, PLAIN_VISION),
    "llava": ({"model_type": "llama"}, PLAIN_VISION),
    "mistral3": ({"model_type": "mistral", "head_dim": 16, "sliding_window": None}, PLAIN_VISION),
    "qwen2_vl": (
        {"rope_parameters": SECTIONS},
        {"depth": 1, "embed_dim": 32, "hidden_size": 96, "num_heads": 2, "patch_size": 14},
    ),
    "qwen2_5_vl": (
        {"rope_parameters": SECTIONS}, QWEN_VISION | {"out_hidden_size": 96, "intermediate_size": 64},
    ),
    "qwen3_5": (
        {
            "model_type": "qwen3_5_text", "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "full_attention_interval": 3,
            "rope_parameters": SECTIONS | {"mrope_interleaved": True, "partial_rotary_factor": 0.5},
        },
        QWEN_VISION | {"out_hidden_size": 96, "intermediate_size": 64},
    ),
    "qwen3_5_moe": (
        {
            "model_type": "qwen3_5_moe_text", "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"], "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "rope_parameters": SECTIONS | {"mrope_interleaved": True, "partial_rotary_factor": 0.5},
        },
        QWEN_VISION | {"out_hidden_size": 96, "intermediate_size": 64},
    ),
    "qwen3_vl": (
        {"head_dim": 16, "rope_parameters": SECTIONS | {"mrope_interleaved": True}},
        QWEN_VISION | {"out_hidden_size": 96, "intermediate_size": 64, "deepstack_visual_indexes": [0]},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`wrapped(case, tied=False) -> folder`: random weights, saved by transformers."""
    made: dict[tuple[str, bool], Path] = {}

    def make(case: str, tied: bool = False) -> Path:
        if (case, tied) not in made:
            text, vision = CASES[case]
            config = transformers.AutoConfig.for_model(
                case, text_config={**TEXT, **text}, vision_config=vision, tie_word_embeddings=tied
            )
            torch.manual_seed(0)
            model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
            for name, parameter in model.named_parameters():
                torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
            for name, buffer in model.named_buffers():
                if name.endswith("layer_scalar"):
                    torch.nn.init.normal_(buffer, 1.0, 0.1)
            made[case, tied] = tmp_path_factory.mktemp(case)
            model.save_pretrained(made[case, tied])
        return made[case, tied]

    return make


def largest_error(model: Path, original: Path) -> float:
    oracle = transformers.AutoModelForImageTextToText.from_pretrained(original, dtype=torch.float32).eval()
    return error_of(engine_of(model), oracle)


def error_of(engine: Engine, oracle: Any) -> float:
    """The largest difference from transformers' logits, as a share of the largest logit."""
    pairs = list(compare_logits(engine, oracle, EDGES))
    ours, expected = (torch.stack(column) for column in zip(*pairs, strict=True))
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_transformers(
    wrapped: Callable[..., Path], record_property: Callable[[str, float], None], case: str, tied: bool
) -> None:
    model = wrapped(case, tied)
    error = largest_error(model, model)
    record_property("largest_error", error)
    assert error <= 1e-4
    assert any("wraps a language model" in note for note in read_model_config(model).notes)
    assert end_of_text_ids(model) == (1,)


@pytest.mark.parametrize("case", CASES)
def test_the_language_model_is_quantized_alone(wrapped: Callable[..., Path], tmp_path: Path, case: str) -> None:
    """transformers reads what is written as a model for text, and computes the same from it, near the original."""
    original, output = wrapped(case), tmp_path / "out"
    quantizer = Quantizer(original, output, weight_scheme("w8a16", 16), method("rtn"))
    notes = [note for report in quantizer.run() for note in report.notes]
    quantizer.finish("# A card\n")
    assert "the language model is written alone, for text" in notes
    assert not read_model_config(output).wrapped and end_of_text_ids(output) == (1,)
    oracle, loading = transformers.AutoModelForCausalLM.from_pretrained(
        output, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    engine = engine_of(output, quantization="none")
    assert error_of(engine, oracle.eval()) <= 1e-4
    whole = transformers.AutoModelForImageTextToText.from_pretrained(original, dtype=torch.float32).eval()
    ours, expected = (torch.stack(column) for column in zip(*compare_logits(engine, whole, EDGES), strict=True))
    assert torch.cosine_similarity(ours, expected).median() > 0.99 and not ours.equal(expected)


NAMES = {
    "qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
    "mistral3": {
        "model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.", "model.multi_modal_projector.": "multi_modal_projector.",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_tensors_are_found_under_their_older_names(wrapped: Callable[..., Path], tmp_path: Path, case: str) -> None:
    model = shutil.copytree(wrapped(case), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for after, before in NAMES[case].items():
        tensors = {name.replace(after, before) if name.startswith(after) else name: t for name, t in tensors.items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert largest_error(model, wrapped(case)) <= 1e-4


def test_one_object_may_hold_the_fields_of_both(wrapped: Callable[..., Path], tmp_path: Path) -> None:
    """Read a file as Qwen2.5-VL was first published: it calls rotary embedding by another name."""
    model = shutil.copytree(wrapped("qwen2_5_vl"), tmp_path / "model")
    raw = json.loads((model / "config.json").read_text())
    text = raw.pop("text_config")
    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    del text["rope_parameters"]
    flat = {**text, **raw, "rope_scaling": rope, "rope_theta": 1e6}
    (model / "config.json").write_text(json.dumps(flat))
    assert largest_error(model, wrapped("qwen2_5_vl")) <= 1e-4


def test_what_cannot_be_is_refused_by_name(wrapped: Callable[..., Path]) -> None:
    raw = json.loads((wrapped("mistral3") / "config.json").read_text())
    with pytest.raises(ValueError, match="wraps a language model of type 'rwkv'; supported in it are mistral, minist"):
        parse_model_config(raw | {"text_config": {"model_type": "rwkv"}})
    with pytest.raises(ValueError, match=r"architectures is \['Other'\]; for mistral3 it must be \['Mistral3For"):
        parse_model_config(raw | {"architectures": ["Other"]})
    with pytest.raises(ValueError, match="text_config is 3; it must be an object"):
        parse_model_config(raw | {"text_config": 3})
    with pytest.raises(ValueError, match=r"config\.json: hidden_act is 'gelu'"):
        parse_model_config(raw | {"text_config": raw["text_config"] | {"hidden_act": "gelu"}})


def test_a_tensor_that_belongs_to_no_part_is_refused(wrapped: Callable[..., Path], tmp_path: Path) -> None:
    model = shutil.copytree(wrapped("llava"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "model.extra.weight": torch.ones(2)}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors that the model does not use: model\.extra\.weight"):
        engine_of(model)
