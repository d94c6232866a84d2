"""Rotation, and what padding may write."""

import pytest
import torch

from batchinfer.kernels.kv_cache import KVCache, cache_rows, rotate


def test_rotation_keeps_scores_a_function_of_distance() -> None:
    angles = torch.outer(torch.arange(100).float(), torch.rand(32))
    x = torch.randn(1, 3, 64).expand(100, 3, 64)
    turned = rotate(x, angles.cos(), angles.sin())
    scores = torch.einsum("ihd,jhd->hij", turned.double(), turned.double())
    for distance in (0, 1, 50):
        diagonal = scores.diagonal(distance, 1, 2)
        torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def test_padding_writes_reach_nobody() -> None:
    cache = KVCache(3, 2, 8, 4, torch.float32)
    cache.store(torch.ones(5, 2, 4), torch.ones(5, 2, 4), cache_rows(torch.tensor([0, 0, 9, 17, 0]), 2, 8))
    assert cache.key[1:].sum() == 2 * 8
    assert cache.key[1, :, 1].sum() == cache.key[2, :, 1].sum() == 8
    cache.clear(torch.tensor([1]))
    assert cache.key[1].abs().sum() == 0 and cache.value[2].sum() == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("by_column", [False, True])
def test_blocks_are_copied_and_cleared_however_they_lie(by_column: bool, dtype: torch.dtype) -> None:
    cache, expected = KVCache(4, 2, 8, 6, dtype, values_by_column=by_column), torch.randn(4, 2, 8, 6).mul(9).to(dtype)
    assert cache.value.is_contiguous() != (by_column and dtype != torch.bfloat16)
    for pool in (cache.key, cache.value):
        pool.copy_(expected)
    cache.copy(torch.tensor([1, 2]), torch.tensor([3, 0]))
    cache.clear_slots(torch.tensor([8 + 3]))
    cache.clear(torch.tensor([2]))
    expected = torch.stack([expected[2], expected[1], torch.zeros_like(expected[2]), expected[1]]).float()
    expected[1, :, 3] = 0
    assert cache.key.float().equal(expected) and cache.value.float().equal(expected)
