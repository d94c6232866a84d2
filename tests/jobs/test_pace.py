"""Rates, and the time left with its range."""

from dataclasses import dataclass

import pytest

from batchinfer.jobs.pace import RECENT_SECONDS, Pace


@dataclass
class Clock:
    """A clock that is put forward by hand."""

    seconds: float = 1000.0

    def __call__(self) -> float:
        return self.seconds


def run(pace: Pace, clock: Clock, seconds: int, rows: int, before: int = 20) -> int:
    """`rows` more end in equal steps, a second each. Returns how many are done."""
    for second in range(1, seconds + 1):
        clock.seconds += 1
        pace.note(before + rows * second // seconds, 0)
    return before + rows


def test_rates_are_of_this_run_and_stay_when_it_has_ended() -> None:
    clock = Clock()
    pace = Pace(20, clock)
    assert pace.left(80) is None
    clock.seconds += 10
    pace.note(60, 500)
    assert (pace.rows_per_second, pace.tokens_per_second) == (4.0, 50.0)
    clock.seconds += 10
    assert pace.rows_per_second == 2.0, "a run that stands still gets slower"
    pace.end()
    clock.seconds += 100
    assert (pace.rows_per_second, pace.tokens_per_second) == (2.0, 25.0)


def test_an_even_pace_has_a_narrow_range_that_is_wider_with_few_rows() -> None:
    widths = []
    for rows in (100, 10_000):
        clock = Clock()
        pace = Pace(20, clock)
        run(pace, clock, 200, rows)
        left = pace.left(rows)
        assert left is not None and left.high is not None
        assert left.estimate == pytest.approx(200)
        assert left.low == pytest.approx(200 * rows / (rows + rows**0.5))
        assert left.high == pytest.approx(200 * rows / (rows - rows**0.5))
        widths.append(left.high - left.low)
    assert widths[0] > 9 * widths[1]


def test_the_range_reaches_to_the_recent_rate() -> None:
    clock = Clock()
    pace = Pace(20, clock)
    done = run(pace, clock, 1000, 10_000)
    done = run(pace, clock, 400, 400, done)  # ten times slower
    left = pace.left(1000)
    assert left is not None and left.high is not None
    assert left.estimate == pytest.approx(1000 / (10_400 / 1400))
    assert left.low == pytest.approx(left.estimate), "nothing says that it will be faster than on the whole"
    recent = RECENT_SECONDS  # rows: one a second
    assert left.high == pytest.approx(1000 * recent / (recent - recent**0.5), rel=0.02)
    run(pace, clock, 301, 0, done)
    still = pace.left(1000)
    assert still is not None and still.high is None


def test_one_row_bounds_nothing() -> None:
    clock = Clock()
    pace = Pace(0, clock)
    clock.seconds += 10
    pace.note(1, 5)
    left = pace.left(9)
    assert left is not None
    assert (left.estimate, left.low, left.high) == (90.0, 45.0, None)
