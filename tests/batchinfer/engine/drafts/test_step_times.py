"""What a step takes, from steps that were seen: a gate goes by it, so that one slow step must not mislead it."""

import numpy as np
import pytest

from batchinfer.engine.drafts.step_times import StepTimes


def of(times: StepTimes, *sizes: int) -> list[float]:
    return times.of(np.array(sizes)).tolist()


def test_before_any_step_nothing_is_known() -> None:
    assert of(StepTimes(), 8, 16) == [0.0, 0.0]


def test_of_one_size_larger_steps_are_expected_to_take_longer_and_less_than_their_share() -> None:
    times = StepTimes()
    for _ in range(20):
        times.observe(8, 0.02)
    eight, sixteen, forty = of(times, 8, 16, 40)
    assert eight == pytest.approx(0.02)
    assert 0.02 < sixteen < 0.04 and sixteen < forty < 0.1


def test_sizes_on_a_line_are_found_and_those_between_them() -> None:
    times = StepTimes()
    rng = np.random.default_rng(0)
    for size in rng.choice([8, 16, 32, 64], 300):
        times.observe(int(size), 0.01 + 0.001 * size)
    assert of(times, 8, 24, 64, 96) == pytest.approx([0.018, 0.034, 0.074, 0.106], rel=0.05)


def test_a_size_with_a_time_of_its_own_keeps_it() -> None:
    """A GPU's steps are padded: they go up in stairs."""
    times = StepTimes()
    for _ in range(50):
        for size, seconds in ((8, 0.010), (16, 0.010), (32, 0.011), (64, 0.030)):
            times.observe(size, seconds)
    assert of(times, 32)[0] == pytest.approx(0.011, rel=0.25)
    assert of(times, 64)[0] == pytest.approx(0.030, rel=0.1)


def test_what_a_token_costs_is_seen_from_one_step_to_the_next() -> None:
    """Rows end and the others grow: fewer tokens take longer, and yet a token more costs something."""
    times = StepTimes()
    times.observe_prompts(500, 1.0)
    for step in range(200):
        size = 24 - step // 10
        times.observe(size, 0.1 + 0.0005 * step + 0.002 * size)
    five, twenty = of(times, 5, 20)
    assert five == pytest.approx(0.2095, rel=0.02) and twenty == pytest.approx(0.2095 + 15 * 0.002, rel=0.05)


def test_one_slow_step_is_not_believed() -> None:
    times = StepTimes()
    for _ in range(50):
        times.observe(8, 0.02)
        times.observe(32, 0.03)
    times.observe(40, 0.2)
    assert of(times, 40)[0] < 0.12
    times.observe(40, 0.034)
    assert of(times, 40)[0] == pytest.approx(0.034, rel=0.1), "its first step made the kernels"


def test_one_slow_step_is_forgotten_while_nothing_is_drafted() -> None:
    """Or nothing would ever be drafted again: what it costs would not be seen."""
    times = StepTimes()
    times.observe_prompts(500, 0.05)
    for seconds in (0.02, 0.02, 0.12):
        times.observe(8, 0.02)
        times.observe(40, seconds)
    dear = of(times, 24)[0]
    for _ in range(200):
        times.observe(8, 0.02)
    assert dear > 0.035 and of(times, 24)[0] < 0.025


def test_prompts_tell_what_a_token_more_will_cost() -> None:
    cheap, dear = StepTimes(), StepTimes()
    for times, seconds in ((cheap, 0.05), (dear, 1.0)):
        times.observe_prompts(500, seconds)
        times.observe(8, 0.02)
    assert of(cheap, 16) == pytest.approx([0.0208])
    assert of(dear, 16) == pytest.approx([0.036])
