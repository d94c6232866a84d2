"""The figures of a job, against plain Python over the same rows; `test_planner.py` has the order."""

import numpy as np
import pytest

from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.jobs.rows.length_figures import LengthFigures, bucketed
from batchinfer.jobs.rows.token_file import StoredRequests

LENGTHS = [5, 300, 32, 33, 1, 300, 64, 65, 31, 5]


def requests_of(lengths: list[int], first_row: int = 0, max_tokens: tuple[int, ...] = (16,)) -> Requests:
    """Prompts of these lengths, each of tokens that tell its row; params in turn."""
    n = len(lengths)
    offsets = np.cumsum([0, *lengths])
    rows = first_row + np.arange(n)
    index = (np.arange(n) % len(max_tokens)).astype(np.int32)
    params = SamplingTable.of([SamplingParams(max_tokens=m) for m in max_tokens])
    return Requests(rows, np.repeat(rows, lengths).astype(np.int32), offsets, rows.astype(np.uint64), params, index)


def plan_of(requests: Requests, block_size: int = 32) -> LengthFigures:
    """Of rows that run in the order of the table."""
    return LengthFigures.of(StoredRequests.of(requests), np.arange(len(requests)), block_size)


def test_figures_of_one_window() -> None:
    plan = plan_of(requests_of(LENGTHS))
    assert (plan.rows, plan.prompt_tokens) == (len(LENGTHS), sum(LENGTHS))
    assert plan.buckets == {32: 5, 64: 2, 128: 1, 256: 0, 512: 2}


@pytest.mark.parametrize("q", [0.0, 0.01, 0.25, 0.5, 0.9, 0.95, 1.0])
def test_quantiles_equal_numpy(q: float) -> None:
    generator = np.random.default_rng(1)
    lengths = generator.integers(1, 900, 777).tolist()
    assert plan_of(requests_of(lengths)).quantile(q) == np.quantile(lengths, q, method="inverted_cdf")


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 5, 9, 10, 1000])
def test_cache_for_the_largest_reservations(max_num_seqs: int) -> None:
    max_tokens = (16, 400, 1)
    plan = plan_of(requests_of(LENGTHS, max_tokens=max_tokens))
    needs = [-(-(n + max_tokens[i % 3]) // 32) * 32 for i, n in enumerate(LENGTHS)]
    assert plan.kv_cache_tokens(max_num_seqs) == sum(sorted(needs, reverse=True)[:max_num_seqs])


def test_windows_add_up() -> None:
    generator = np.random.default_rng(2)
    lengths = generator.integers(1, 200, 1000).tolist()
    whole = plan_of(requests_of(lengths))
    parts = [plan_of(requests_of(lengths[a : a + 300])) for a in range(0, 1000, 300)]
    added = sum(parts, plan_of(requests_of([])))
    assert (added.rows, added.prompt_tokens, added.buckets) == (whole.rows, whole.prompt_tokens, whole.buckets)
    assert [added.kv_cache_tokens(n) for n in (1, 64, 2000)] == [whole.kv_cache_tokens(n) for n in (1, 64, 2000)]
    assert added.quantile(0.5) == whole.quantile(0.5)
    # Its size is the longest row's, not the number of rows.
    assert max(len(added.lengths), len(added.reservations)) <= 217


def test_no_rows() -> None:
    plan = plan_of(requests_of([]))
    assert (plan.rows, plan.prompt_tokens, plan.quantile(0.5), plan.kv_cache_tokens(64)) == (0, 0, 0, 0)
    assert plan.buckets == {32: 0}


def test_duplicates_count_as_rows_and_not_in_the_cache() -> None:
    """Rows 0 and 3 follow others."""
    prompts = StoredRequests.of(requests_of([100, 300, 64, 200]))
    plan = LengthFigures.of(prompts, np.array([1, 2]), block_size=32)
    assert (plan.rows, plan.prompt_tokens, plan.duplicates, plan.duplicate_tokens) == (4, 664, 2, 300)
    assert plan.kv_cache_tokens(4) == 320 + 96
    both = plan + plan
    assert (both.duplicates, both.duplicate_tokens) == (4, 600)


def test_shared_tokens_and_groups_add_up() -> None:
    alike = [[5] * 130, [5] * 130 + [6], [5] * 65, [6] * 65, [6] * 200, [7] * 64, [7] * 64]
    prompts = StoredRequests.of(Requests.of(alike, SamplingParams()))
    plan = LengthFigures.of(prompts, np.arange(7), block_size=32)
    assert (plan.shared_tokens, plan.groups, plan.grouped_rows) == (64 * (2 + 1 + 1), 2, 5)
    both = plan + plan
    assert (both.shared_tokens, both.groups, both.grouped_rows) == (64 * 8, 4, 10)


def test_answers_are_counted_by_the_powers_of_two() -> None:
    counts = {0: 2, 1: 3, 2: 5, 3: 7, 4: 11, 5: 13, 64: 17, 65: 19}
    assert bucketed(counts) == {"1": 5, "2": 5, "4": 18, "8": 13, "64": 17, "128": 19}
