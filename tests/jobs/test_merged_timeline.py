"""Timelines of shards, joined on Unix time: rates of machines side by side add up, and no row is lost."""

import numpy as np
import pytest

from batchinfer.jobs.merged_timeline import side_by_side
from batchinfer.jobs.timeline import MOST, Sample


def steady(began: float, count: int, rows: int = 10, running: float = 4.0, cache: float = 0.5) -> list[Sample]:
    return [Sample(began + 10 * i, 10.0, rows, 5 * rows, 3 * rows, running, cache) for i in range(count)]


def test_rates_of_machines_side_by_side_add_up() -> None:
    joined = side_by_side([steady(1000.0, 6), steady(1020.0, 6, rows=30, running=8.0, cache=0.25)])
    assert [sample.began for sample in joined] == [1000.0 + 10 * i for i in range(8)]
    assert [sample.rows for sample in joined] == [10, 10, 40, 40, 40, 40, 30, 30]
    assert [sample.running for sample in joined] == pytest.approx([4, 4, 12, 12, 12, 12, 8, 8])
    assert [sample.kv_cache_used for sample in joined] == pytest.approx([0.5] * 2 + [0.375] * 4 + [0.25] * 2)
    assert sum(sample.prompt_tokens for sample in joined) == 5 * 240


def test_time_in_which_no_shard_worked_is_left_out() -> None:
    joined = side_by_side([steady(1000.0, 3), steady(90_000.0, 3)])
    assert [(sample.began, sample.seconds, sample.rows) for sample in joined] == [
        *((1000.0 + 10 * i, 10.0, 10) for i in range(3)), *((90_000.0 + 10 * i, 10.0, 10) for i in range(3)),
    ]  # fmt: skip


@pytest.mark.parametrize("shards", [1, 2, 16])
def test_of_long_jobs_no_figure_is_lost_and_few_samples_are_kept(shards: int) -> None:
    random = np.random.default_rng(shards)
    timelines = []
    for _ in range(shards):
        seconds = random.lognormal(0, 2, MOST)
        began = 1e9 + random.uniform(0, 1000) + np.cumsum([0, *seconds[:-1]])
        rows = random.integers(0, 50, MOST)
        timelines.append([
            Sample(float(b), float(s), int(r), 7 * int(r), 3 * int(r), 1.0, 0.1)
            for b, s, r in zip(began, seconds, rows, strict=True)
        ])  # fmt: skip
    joined = side_by_side(timelines)
    assert 1 < len(joined) <= MOST
    for name in ("rows", "prompt_tokens", "completion_tokens"):
        total = sum(getattr(sample, name) for samples in timelines for sample in samples)
        assert sum(getattr(sample, name) for sample in joined) == total
        assert all(getattr(sample, name) >= 0 for sample in joined)
    assert [sample.began for sample in joined] == sorted(sample.began for sample in joined)


def test_odd_timelines() -> None:
    assert side_by_side([]) == side_by_side([[], []]) == []
    moment = Sample(5.0, 0.0, 3, 2, 1, 1.0, 0.5)
    assert [(sample.rows, sample.seconds) for sample in side_by_side([[moment], []])] == [(3, 0.0)]
    back = [Sample(100.0, 10.0, 4, 0, 0, 1.0, 0.5), Sample(50.0, 10.0, 6, 0, 0, 1.0, 0.5)]  # its clock was put back
    assert sum(sample.rows for sample in side_by_side([back, steady(95.0, 2)])) == 30
