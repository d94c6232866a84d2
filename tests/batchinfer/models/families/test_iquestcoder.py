"""IQuest-Coder against transformers: it computes what Llama computes."""

from collections.abc import Callable
from pathlib import Path

from engines import assert_logits_of_transformers


def test_logits_are_those_of_transformers(make_model: Callable[..., Path]) -> None:
    assert_logits_of_transformers(make_model("iquestcoder", head_dim=16))
