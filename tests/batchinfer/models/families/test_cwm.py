"""Code World Model against transformers: a window in some layers, and scaled rotary angles."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import assert_logits_of_transformers

from batchinfer.models.config import parse_model_config


def test_logits_are_those_of_transformers(make_model: Callable[..., Path]) -> None:
    assert_logits_of_transformers(
        make_model(
            "cwm",
            head_dim=16,
            sliding_window=24,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        )
    )


@pytest.mark.parametrize("key", ["layer_types", "rope_parameters"])
def test_what_the_file_leaves_out_is_not_guessed(make_model: Callable[..., Path], key: str) -> None:
    raw = json.loads((make_model("cwm", head_dim=16) / "config.json").read_text())
    del raw[key]
    with pytest.raises(ValueError, match=f"config.json has no {key}"):
        parse_model_config(raw)
