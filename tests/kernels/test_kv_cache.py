"""Rotation, and what padding may write."""

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
