"""Rotating and storing in C against the plain reference, in every type of cache."""

import ctypes

import pytest
import torch
from compiled import libraries

from batchinfer.kernels.backend_cpu import CpuBackend
from batchinfer.kernels.kv_cache import KVCache, cache_rows
from batchinfer.kernels.kv_cache_cpu import TYPES, rotate_and_store


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("kv", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 64), (3, 3, 20), (4, 1, 256)])
@pytest.mark.parametrize(("normed", "by_head", "last", "values"), [
    (False, False, False, False), (True, False, False, False), (True, True, True, True)
])  # fmt: skip
def test_queries_and_cache_are_those_of_the_reference(
    library: ctypes.CDLL,
    kv: torch.dtype,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    normed: bool,
    by_head: bool,
    last: bool,
    values: bool,
) -> None:
    qkv = torch.randn(11, (heads + 2 * kv_heads) * head_dim).to(dtype)
    angles = torch.rand(11, head_dim // 2) * 6
    slots = torch.randperm(4 * 32)[:11]
    shapes = [(heads, head_dim), (kv_heads, head_dim)] if by_head else [(head_dim,), (head_dim,)]
    norms = tuple((torch.rand(shape) + 0.5).to(dtype) for shape in shapes) if normed else None
    found, expected = (KVCache(4, kv_heads, 32, head_dim, kv, keys_by_column=column) for column in (True, False))
    query = rotate_and_store(
        library, qkv.clone(), found, heads, angles.cos(), angles.sin(), slots, norms or (None, None), values, 1e-5, last
    )
    rows = cache_rows(slots, kv_heads, 32)
    reference = CpuBackend().rotate_and_store(
        qkv.clone(), expected, heads, angles.cos(), angles.sin(), rows, norms, values, 1e-5, last
    )
    near = {torch.float32: 1e-5, torch.bfloat16: 0.04}[dtype]
    torch.testing.assert_close(query, reference, rtol=near, atol=near)
    for pool, scales, other, other_scales in (
        (found.key, found.key_scale, expected.key, expected.key_scale),
        (found.value, found.value_scale, expected.value, expected.value_scale),
    ):
        got, wanted = pool.float(), other.float()
        if scales is not None and other_scales is not None:
            torch.testing.assert_close(scales, other_scales, rtol=near, atol=near)
            got, wanted = got * scales[..., None], wanted * other_scales[..., None]
        step = 0.0 if scales is None else float(scales.max()) * 1.01  # a number half-way may go to either side
        atol = max(near, step, {torch.bfloat16: 0.04, torch.float16: 0.005}.get(kv, 0.0))
        torch.testing.assert_close(got, wanted, rtol=max(near, atol), atol=atol)
        assert (got != 0).any(-1).sum() == 11 * kv_heads


@pytest.mark.parametrize("library", libraries())
def test_queries_alone(library: ctypes.CDLL) -> None:
    query, angles = torch.randn(5, 3 * 16), torch.rand(5, 8)
    found = rotate_and_store(library, query, None, 3, angles.cos(), angles.sin(), None, (None, None), False, 1e-5)
    expected = CpuBackend().rotate_queries(query, 3, angles.cos(), angles.sin(), None, 1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_head_that_is_not_finite_keeps_that_in_8_bits(library: ctypes.CDLL, bad: float) -> None:
    qkv, angles = torch.randn(2, 3 * 16), torch.zeros(2, 8)
    qkv[0, 20] = qkv[0, 40] = bad
    cache = KVCache(2, 1, 16, 16, torch.int8, keys_by_column=True)
    slots = torch.tensor([17, 18])
    rotate_and_store(library, qkv, cache, 1, angles.cos(), angles.sin(), slots, (None, None), False, 1e-5)
    assert cache.key_scale is not None and cache.value_scale is not None
    assert not cache.key_scale[1, 0, 1].isfinite() and not cache.value_scale[1, 0, 1].isfinite()
    assert cache.key_scale[1, 0, 2].isfinite() and cache.value_scale[1, 0, 2].isfinite()
