"""The modules that stay in floating point, beside those of transformers."""

from typing import Any

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from batchinfer.formats.left_out import LeftOut, is_head

MODULES = [
    f"{prefix}layers.{i}.{module}"
    for prefix in ("model.", "model.language_model.")
    for i in (1, 11)
    for module in ("mlp.down_proj", "mlp.up_proj", "mlp.gate", "mlp.gate_proj", "self_attn.q_proj", "mlp.experts.1.w1")
] + ["lm_head", "model.vision_tower.layers.1.q_proj", "my_lm_head"]


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["down_proj"],  # an end
        ["proj"],  # a part of a word at the end
        ["mlp"],  # neither a beginning nor an end
        ["model"],
        ["model."],
        ["layers"],
        ["model.layers.1"],  # not layer 11
        ["model.layers.1."],
        ["model.layers.1.mlp", "lm_head"],
        ["model.layers.11.mlp.down_proj"],
        ["gate", "model.vision_tower"],
        ["model.layers.1.mlp.gate"],  # not its gate_proj
        ["model.layers.*"],
        [r"model.layers.\d+.self_attn"],
        [r"model\.layers\.1\.mlp\.(gate|up_proj)"],
        ["model.layers.1|model.layers.11"],
        [".*mlp.down_proj"],
        [""],
    ],
)
def test_the_modules_are_those_of_transformers(names: list[str]) -> None:
    left_out = LeftOut({"modules_to_not_convert": names}, "modules_to_not_convert")
    assert [module in left_out for module in MODULES] == [not should_convert_module(m, names) for m in MODULES]


def test_without_names_the_head_stays() -> None:
    for config in ({}, {"modules_to_not_convert": None}):
        left_out = LeftOut(config, "modules_to_not_convert", "ignored_layers")
        assert [module for module in MODULES if module in left_out] == ["lm_head", "my_lm_head"]
    left_out = LeftOut(
        {"modules_to_not_convert": None, "ignored_layers": ["gate"]}, "modules_to_not_convert", "ignored_layers"
    )
    assert "model.layers.1.mlp.gate" in left_out and "lm_head" not in left_out


def test_the_head_is_known_by_its_name() -> None:
    assert [module for module in MODULES if is_head(module)] == ["lm_head"]
    assert is_head("language_model.lm_head")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("lm_head", "modules_to_not_convert is 'lm_head'; expected a list of names"),
        ([1], r"modules_to_not_convert is \[1\]; expected a list of names"),
        (["*.gate"], r"modules_to_not_convert: '\*\.gate' is not a regular expression"),
    ],
)
def test_other_values_are_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeftOut({"modules_to_not_convert": value}, "modules_to_not_convert")
