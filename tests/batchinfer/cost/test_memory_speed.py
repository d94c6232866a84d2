"""What memory costs beside a cache, from products on more and more weights."""

import numpy as np
import pytest

from batchinfer.cost import memory_speed
from batchinfer.cost.memory_speed import last_cache, measure_memory
from batchinfer.cost.step_cost import PRODUCTS

MIB = float(1 << 20)
SIZES = np.array([4, 8, 16, 32, 64, 128, 256, 512, 1024]) * MIB


def from_a_cache_of(nbytes: float, cached: float, from_memory: float) -> tuple[np.ndarray, np.ndarray]:
    share = np.clip(SIZES / nbytes - 0.5, 0.0, 1.0)
    return SIZES, cached + share * (from_memory - cached)


@pytest.mark.parametrize("mib", [20, 32, 100, 256])
def test_the_cache_ends_where_half_comes_from_memory(mib: int) -> None:
    """Whatever the system says of it: between two sizes it is met to an eighth."""
    assert last_cache([from_a_cache_of(mib * MIB, 3e-11, 5e-11)]) == pytest.approx(mib * MIB, rel=0.125)


def test_products_that_do_not_wait_for_memory_do_not_tell_the_cache() -> None:
    noise = np.random.default_rng(0).normal(1, 0.02, len(SIZES))
    found = last_cache([(SIZES, 2e-10 * noise), from_a_cache_of(64 * MIB, 3e-11, 5e-11)])
    assert found == pytest.approx(64 * MIB, rel=0.125)


def test_a_processor_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real products of each kind, on few weights."""
    monkeypatch.setattr(memory_speed, "LARGEST", 32 << 20)
    monkeypatch.setattr(memory_speed, "COPY_BYTES", 1 << 20)
    found = measure_memory("cpu")
    assert set(found.byte_seconds) == set(PRODUCTS) and min(found.byte_seconds.values()) >= 0
    assert 4 * MIB <= found.cache_bytes <= 32 * MIB and found.bytes_per_second > 0
