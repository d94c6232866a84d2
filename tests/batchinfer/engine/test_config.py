"""The types that an engine computes in and caches in."""

from pathlib import Path

import pytest

from batchinfer.engine.config import EngineConfig


@pytest.mark.parametrize(
    ("dtype", "stored", "has_float16", "computed"),
    [
        ("auto", "bfloat16", False, "bfloat16"),
        ("auto", "float16", True, "float16"),
        ("auto", "float16", False, "float32"),
        ("float16", "float32", False, "float16"),  # refuse or take it as it was asked for
        ("bfloat16", "float16", False, "bfloat16"),
    ],
)
def test_weights_are_multiplied_as_asked_or_as_stored(
    dtype: str, stored: str, has_float16: bool, computed: str
) -> None:
    assert EngineConfig(Path(), dtype=dtype).computed_in(stored, has_float16) == computed


@pytest.mark.parametrize(("asked", "cached"), [("auto", "bfloat16"), ("int8", "int8")])
def test_keys_and_values_are_cached_as_asked_or_as_computed(asked: str, cached: str) -> None:
    assert EngineConfig(Path(), kv_cache_dtype=asked).cached_in("bfloat16") == cached
