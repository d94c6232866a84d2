"""What rows before it took says what a row will take."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engines import engine_of, prompts_of, run

from batchinfer.engine.output_lengths import BIN, LEAST_ENDED, MOST_TEMPLATES, OutputLengths
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable

NOBODY = np.empty(0, np.int64)


def lengths_of(ended: dict[int, dict[int, int]]) -> OutputLengths:
    """By template, so many tokens: so many rows."""
    lengths = OutputLengths(512)
    for template, counts in ended.items():
        for tokens, count in counts.items():
            for _ in range(count):
                lengths.observe(template, tokens)
    return lengths


def up_to_a_bin(expected: int, tokens: int) -> bool:
    """Whether so many tokens were expected, and no more than the bin's rest above."""
    return tokens < expected <= tokens + BIN


def test_a_template_is_expected_to_take_what_its_own_rows_took() -> None:
    lengths = lengths_of({0: {20: 40}, 1: {200: 40}, 2: {300: LEAST_ENDED - 1}, -1: {100: 10}})
    assert [lengths.known(template) for template in (0, 1, 2, 3, -1)] == [0, 1, -1, -1, -1]
    assert up_to_a_bin(lengths.expected(0, 0, 512, NOBODY), 20)
    assert up_to_a_bin(lengths.expected(1, 0, 512, NOBODY), 200)
    assert up_to_a_bin(lengths.expected(-1, 0, 512, NOBODY), 300), "all rows together, for those that are like nobody"


@pytest.mark.parametrize("template", [0, -1])
def test_too_few_rows_tell_nothing(template: int) -> None:
    lengths = lengths_of({template: {20: LEAST_ENDED - 1}})
    assert lengths.known(template) == -1 and lengths.expected(-1, 0, 512, NOBODY) == 512
    assert lengths.expected(-1, 0, 512, np.full(100, 30)) == 512, "rows under way have not ended"
    lengths.observe(template, 20)
    assert lengths.known(template) == template and up_to_a_bin(lengths.expected(template, 0, 512, NOBODY), 20)


def test_no_row_is_expected_to_take_more_than_it_may() -> None:
    lengths = lengths_of({0: {200: 40}})
    assert lengths.expected(0, 0, 60, NOBODY) == 60


def test_rows_under_way_count_as_far_as_they_have_come() -> None:
    """The rows that end first are the short ones: 38 of 40 that ended, but only 38 of 60 that came so far."""
    lengths = lengths_of({0: {20: 38, 200: 2}})
    assert up_to_a_bin(lengths.expected(0, 0, 512, NOBODY), 20)
    assert up_to_a_bin(lengths.expected(0, 0, 512, np.full(20, 100)), 200)
    assert up_to_a_bin(lengths.expected(0, 0, 512, np.full(20, 5)), 20), "they may still end with 20 tokens"
    lengths = lengths_of({0: {20: 38}})
    assert lengths.expected(0, 0, 512, np.full(20, 100)) == 512, "nobody knows where those that are further end"


def test_the_expectation_is_the_estimate_of_kaplan_and_meier() -> None:
    """By its definition, over lengths with many ends and many rows under way between them."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        ends, running = rng.integers(1, 300, 60), rng.integers(0, 300, 40)
        lengths = lengths_of({0: {int(n): int((ends == n).sum()) for n in ends}})
        survives, edge = 1.0, 0
        while survives > 1 - lengths.quantile and edge <= 512:
            reached = (ends >= edge).sum() + (running >= edge).sum()
            survives *= 1 - ((ends >= edge) & (ends < edge + BIN)).sum() / max(reached, 1)
            edge += BIN
        assert lengths.expected(0, 0, 512, running) == min(edge, 512)


def test_a_row_that_came_far_is_expected_to_go_further() -> None:
    """Compared to those that came as far, not to all."""
    lengths = lengths_of({0: {20: 95, 200: 5}})
    assert up_to_a_bin(lengths.expected(0, 10, 512, NOBODY), 20)
    assert up_to_a_bin(lengths.expected(0, 100, 512, NOBODY), 200)
    assert lengths.expected(0, 250, 512, NOBODY) == 512, "nobody came so far"


def test_what_was_too_little_grows() -> None:
    lengths = lengths_of({0: {4 * i: 1 for i in range(1, 101)}})
    found = []
    for _ in range(7):
        found.append(lengths.expected(0, 0, 512, NOBODY))
        lengths.grow()
    assert found[:3] == sorted(set(found[:3])), "each time more"
    assert all(wanted < tokens <= wanted + 2 * BIN for wanted, tokens in zip((360, 380, 390), found, strict=False))
    assert found[-1] <= 400 + BIN < 512, "as much as the longest row took, at most"


def test_a_preemption_lets_the_engine_expect_more(make_model: Callable[..., Path]) -> None:
    """Short rows first, so that long ones are admitted for short."""
    prompts = prompts_of(80, 40)
    short, long = (SamplingParams(max_tokens=n, ignore_eos=True) for n in (4, 100))
    requests = Requests.of(prompts, short)
    index = (np.arange(80) >= 40).astype(np.int32)
    requests = replace(requests, params=SamplingTable.of([short, long]), param_index=index)
    model = make_model("llama")
    for kv_cache_tokens in (576, 8192):
        engine = engine_of(model, kv_cache_tokens=kv_cache_tokens)
        lengths = engine.scheduler.admission.lengths
        assert lengths is not None
        run(engine, requests)
        preemptions = engine.stats().preemptions
        assert (preemptions > 0) == (kv_cache_tokens == 576)
        assert 1 - lengths.quantile == pytest.approx(0.1 / 2**preemptions)


def test_templates_of_long_ago_are_forgotten() -> None:
    lengths = lengths_of({template: {20: LEAST_ENDED} for template in range(MOST_TEMPLATES)})
    assert lengths.known(0) == 0
    lengths.observe(MOST_TEMPLATES, 20)
    assert lengths.known(0) == -1 and lengths.known(1) == 1
