"""Every family that GGUF files hold: a file gives the logits that the checkpoint it was made of gives.

`tests/support/gguf_facts.py` and `gguf_layout.py` lay files out. llama.cpp's own converter made the same entries and
tensors of the same checkpoints, and llama.cpp itself the same tokens.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engines import compare_logits, engine_of, logits_of, prompts_of
from gguf_families import ADAPTED, gguf_case
from gguf_layout import laid_out
from gguf_models import write_model

from batchinfer.models.config import read_model_config
from batchinfer.models.gguf_architectures import ARCHITECTURES
from batchinfer.models.gguf_folder import unpack_gguf


@pytest.mark.parametrize("case", ADAPTED)
def test_logits_are_those_of_transformers(make_model: Callable[..., Path], tmp_path: Path, case: str) -> None:
    family, fields = gguf_case(case)
    model = make_model(family, **fields)
    assert_same_logits(model, tmp_path)


def assert_same_logits(model: Path, tmp_path: Path, **options: Any) -> None:
    write_model(tmp_path / "m.gguf", model, "F32", **options)
    unpack_gguf(tmp_path / "m.gguf", tmp_path / "unpacked")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    engine = engine_of(tmp_path / "unpacked", dtype="float32", max_model_len=128)
    for ours, expected in compare_logits(engine, oracle, prompts_of(3, 100)):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert not engine.stats().notes


def test_each_family_that_files_hold_has_a_case() -> None:
    found = set[str]().union(*(architecture.families for architecture in ARCHITECTURES.values()))
    assert {gguf_case(case)[0] for case in ADAPTED} == found


@pytest.mark.parametrize(
    ("case", "architecture"), [("qwen2", "qwen2vl"), ("qwen3", "qwen3vl"), ("qwen3_moe", "qwen3vlmoe")]
)
def test_language_models_of_vision_models_are_read(
    make_model: Callable[..., Path], tmp_path: Path, case: str, architecture: str
) -> None:
    family, fields = gguf_case(case)
    sections = {"rope.dimension_sections": [4, 2, 2, 0]}
    assert_same_logits(make_model(family, **fields), tmp_path, architecture=architecture, changes=sections)


@pytest.mark.parametrize("case", ["qwen2_moe", "llama"])
def test_matrices_with_the_same_input_may_be_one_tensor(
    make_model: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    family, fields = gguf_case(case)
    assert_same_logits(make_model(family, **fields), tmp_path, joined=True)


def test_layers_that_predict_further_tokens_are_left_aside(make_model: Callable[..., Path], tmp_path: Path) -> None:
    family, fields = gguf_case("glm4_moe")
    further: dict[str, Any] = {"blk.3.nextn.eh_proj": np.zeros((96, 192), np.float32)}
    changes = {"block_count": 4, "nextn_predict_layers": 1}
    assert_same_logits(make_model(family, **fields), tmp_path, changes=changes, **further)


def test_a_factor_without_a_type_scales_rope_linearly(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model("llama", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})
    assert_same_logits(model, tmp_path, changes={"rope.scaling.factor": 4.0})


def test_long_rope_has_both_lists_of_divisors(make_model: Callable[..., Path], tmp_path: Path) -> None:
    family, fields = gguf_case("phi3, part of a head")
    model = make_model(family, **fields)
    write_model(tmp_path / "m.gguf", model, "F32")
    unpack_gguf(tmp_path / "m.gguf", tmp_path / "unpacked")
    ours, expected = (read_model_config(folder).attentions[0].rope for folder in (tmp_path / "unpacked", model))
    assert ours.long_divisors == expected.long_divisors and ours.divisors == expected.divisors
    assert ours.attention_factor == pytest.approx(expected.attention_factor) and expected.attention_factor > 1


@pytest.mark.parametrize(
    ("case", "key", "value", "said"),
    [
        ("qwen3_moe", "expert_weights_scale", 2.0, "weights_scale is '2.0'; supported is 1.0: take the model in"),
        ("qwen3_moe", "expert_gating_func", 2, "expert_gating_func is '2'; supported is 1"),
        ("mixtral", "expert_weights_norm", False, "expert_weights_norm is 'False'; supported is True"),
        ("gpt_oss", "rope.freq_base_swa", 500.0, "rope.freq_base_swa is '500.0'; supported is 1000000.0"),
        ("granite", "rope.scaling.finetuned", False, "rope.scaling.finetuned is 'False'; supported is True"),
        ("llama", "logit_scale", 2.0, "logit_scale is '2.0'; supported is 1.0"),
        ("llama", "rope.scaling.type", "longrope", "has no tensor rope_factors_short.weight"),
        ("llama", "rope.scaling.type", 4, "rope.scaling.type is '4'; expected a text"),
        ("llama", "block_count", 5000, "block_count is '5000'; expected no more than the 51 tensors of the file"),
        ("llama", "embedding_length", None, "has no llama.embedding_length; expected a number: convert the model anew"),
        ("llama", "attention.head_count", 0, "attention.head_count is '0'; expected a whole number of 1 or more"),
        ("llama", "nextn_predict_layers", 3, "nextn_predict_layers is '3'; expected a number below block_count, 3"),
        ("lfm2", "attention.head_count_kv", [1, 2, 2], r"attention.head_count_kv is '\[1 2 2\]'; expected a number"),
        ("qwen3_next", "ssm.state_size", None, "has no qwen3next.ssm.state_size; expected a number"),
        ("gpt_neox", "use_parallel_residual", 1, "use_parallel_residual is '1'; expected true or false"),
    ],
)  # fmt: skip
def test_entries_that_are_wrong_or_ask_for_another_model_are_named(
    make_model: Callable[..., Path], tmp_path: Path, case: str, key: str, value: Any, said: str
) -> None:
    family, fields = gguf_case(case)
    write_model(tmp_path / "m.gguf", make_model(family, **fields), "F32", changes={key: value})
    with pytest.raises(ValueError, match=said):
        unpack_gguf(tmp_path / "m.gguf", tmp_path / "unpacked")


@pytest.mark.parametrize(
    ("tensor", "count", "said"),
    [
        ("ffn_down_exps", 5, "blk.0.ffn_down_exps.weight holds 5 experts; expert_count is larger"),
        ("ffn_down_exps", 7, "blk.0.ffn_down_exps.weight holds 7 experts; expert_count is 6"),
        ("ffn_gate_inp", 5, r"blk.0.ffn_gate_inp.weight has shape \[5, 96\]; its hyperparameters ask for \[6, 96\]"),
    ],
)
def test_another_number_of_experts_than_the_entry_says_is_refused(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str, count: int, said: str
) -> None:
    def cut(model: Path, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, values in laid_out(model, config):
            yield name, np.resize(values, (count, *values.shape[1:])) if tensor in name else values

    monkeypatch.setattr("gguf_models.laid_out", cut)
    family, fields = gguf_case("qwen3_moe")
    write_model(tmp_path / "m.gguf", make_model(family, **fields), "F32")
    unpack_gguf(tmp_path / "m.gguf", tmp_path / "unpacked")
    with pytest.raises(ValueError, match=said):
        engine_of(tmp_path / "unpacked")


QUANTIZED = {
    "gpt_oss": "Q8_0, MXFP4", "granitemoeshared": "Q8_0, Q4_0", "lfm2": "Q8_0", "phi3": "Q5_1", "qwen3_5_text": "Q8_0",
    "qwen3_moe": "Q8_0, Q5_0", "qwen3_next": "Q8_0",
}  # fmt: skip


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_tensors_are_the_numbers_that_they_stand_for(
    make_model: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    family, fields = gguf_case(case)
    logits = []
    for expanded in (False, True):
        path = tmp_path / f"{expanded}.gguf"
        write_model(path, make_model(family, **fields), QUANTIZED[case], expanded=expanded)
        unpack_gguf(path, path.with_suffix(""))
        engine = engine_of(path.with_suffix(""), dtype="float32", max_model_len=128)
        logits.append(torch.stack([ours for _, ours in logits_of(engine, prompts_of(3, 100))]))
        if not expanded:
            kinds = ", ".join(sorted(QUANTIZED[case].split(", ")))
            note = f"the checkpoint is GGUF, {kinds}: its matrices are expanded to float32 at load"
            assert engine.stats().notes == [note]
    torch.testing.assert_close(*logits, atol=1e-6, rtol=1e-6)
