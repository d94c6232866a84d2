"""Ministral against transformers: a window in some layers."""

from collections.abc import Callable
from pathlib import Path

from engines import assert_logits_of_transformers


def test_logits_are_those_of_transformers(make_model: Callable[..., Path]) -> None:
    assert_logits_of_transformers(
        make_model(
            "ministral",
            head_dim=16,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    )
