"""The choices that a job may name are those that the engine has."""

from batchinfer.engine.config import DTYPES, KV_CACHE_BYTES, KV_CACHE_DTYPES
from batchinfer.engine.model_runner import DTYPES as TORCH_DTYPES
from batchinfer.kernels.kv_cache import KV_DTYPES


def test_types_are_those_of_the_engine() -> None:
    assert ("auto", *TORCH_DTYPES) == DTYPES
    assert ("auto", *KV_DTYPES) == KV_CACHE_DTYPES
    assert {name: dtype.itemsize for name, dtype in KV_DTYPES.items()} == KV_CACHE_BYTES
