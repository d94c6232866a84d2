"""The order of a window and the figures of a job, against plain Python over the same rows."""

import random

import numpy as np
import pytest

from batchinfer.jobs.planner import JobPlan, plan_window
from batchinfer.request import Requests, SamplingParams

LENGTHS = [5, 300, 32, 33, 1, 300, 64, 65, 31, 5]


def requests_of(lengths: list[int], first_row: int = 0, max_tokens: tuple[int, ...] = (16,)) -> Requests:
    """Prompts of these lengths, each of tokens that tell its row; params in turn."""
    n = len(lengths)
    offsets = np.cumsum([0, *lengths])
    rows = first_row + np.arange(n)
    index = (np.arange(n) % len(max_tokens)).astype(np.int32)
    params = tuple(SamplingParams(max_tokens=m) for m in max_tokens)
    return Requests(rows, np.repeat(rows, lengths).astype(np.int32), offsets, rows.astype(np.uint64), params, index)


def test_longest_first_and_neighbours_alike() -> None:
    planned = plan_window(requests_of(LENGTHS, first_row=100))
    expected = sorted(range(len(LENGTHS)), key=lambda i: (-LENGTHS[i], i))
    assert (planned.rows - 100).tolist() == expected
    assert np.diff(planned.offsets).tolist() == sorted(LENGTHS, reverse=True)
    for i, row in enumerate(planned.rows):  # prompt and seed went with their row
        assert set(planned.token_ids[planned.offsets[i] : planned.offsets[i + 1]]) == {row}
        assert planned.seeds[i] == row


def test_the_order_is_the_rows_own(rows: int = 500) -> None:
    """However the rows come, they run in one order."""
    generator = random.Random(0)
    requests = requests_of([generator.randrange(1, 20) for _ in range(rows)])
    shuffled = requests.take(np.array(generator.sample(range(rows), rows)))
    assert plan_window(shuffled).rows.tolist() == plan_window(requests).rows.tolist()
    assert plan_window(requests_of([])).rows.tolist() == []


def test_figures_of_one_window() -> None:
    plan = JobPlan.of(requests_of(LENGTHS), block_size=32)
    assert (plan.rows, plan.prompt_tokens) == (len(LENGTHS), sum(LENGTHS))
    assert plan.buckets == {32: 5, 64: 2, 128: 1, 256: 0, 512: 2}
    assert plan.padding_tokens == 5 * 32 + 2 * 64 + 128 + 2 * 512 - sum(LENGTHS)


@pytest.mark.parametrize("q", [0.0, 0.01, 0.25, 0.5, 0.9, 0.95, 1.0])
def test_quantiles_equal_numpy(q: float) -> None:
    generator = np.random.default_rng(1)
    lengths = generator.integers(1, 900, 777).tolist()
    assert JobPlan.of(requests_of(lengths), 32).quantile(q) == np.quantile(lengths, q, method="inverted_cdf")


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 5, 9, 10, 1000])
def test_cache_for_the_largest_reservations(max_num_seqs: int) -> None:
    max_tokens = (16, 400, 1)
    plan = JobPlan.of(requests_of(LENGTHS, max_tokens=max_tokens), block_size=32)
    needs = [-(-(n + max_tokens[i % 3]) // 32) * 32 for i, n in enumerate(LENGTHS)]
    assert plan.kv_cache_tokens(max_num_seqs) == sum(sorted(needs, reverse=True)[:max_num_seqs])


def test_windows_add_up() -> None:
    generator = np.random.default_rng(2)
    lengths = generator.integers(1, 200, 1000).tolist()
    whole = JobPlan.of(requests_of(lengths), 32)
    parts = [JobPlan.of(requests_of(lengths[a : a + 300]), 32) for a in range(0, 1000, 300)]
    added = sum(parts, JobPlan.of(requests_of([]), 32))
    assert (added.rows, added.prompt_tokens, added.buckets) == (whole.rows, whole.prompt_tokens, whole.buckets)
    assert [added.kv_cache_tokens(n) for n in (1, 64, 2000)] == [whole.kv_cache_tokens(n) for n in (1, 64, 2000)]
    assert added.quantile(0.5) == whole.quantile(0.5)
    # Its size is the longest row's, not the number of rows.
    assert max(len(added.lengths), len(added.reservations)) <= 217


def test_no_rows() -> None:
    plan = JobPlan.of(requests_of([]), block_size=32)
    assert (plan.rows, plan.prompt_tokens, plan.quantile(0.5), plan.kv_cache_tokens(64)) == (0, 0, 0, 0)
    assert plan.buckets == {32: 0} and plan.padding_tokens == 0
