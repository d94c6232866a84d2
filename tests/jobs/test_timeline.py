"""The figures over time: bounded, exact in their sums. tests/jobs/test_job_resume.py kills jobs that write them."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stub_jobs import make_model, prompts, spec, write

from batchinfer.engine.config import EngineStats
from batchinfer.errors import Refused
from batchinfer.jobs.job import run
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.timeline import MOST, Sample, Timeline, join_shortest, read_timeline


class Clock:
    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def stats(tokens: int, running: int = 0) -> EngineStats:
    return EngineStats(prompt_tokens=tokens, completion_tokens=2 * tokens, running=running, kv_cache_used=running / 64)


@pytest.mark.parametrize("count", [1, MOST, MOST + 1, 3 * MOST])
def test_of_a_long_job_no_figure_is_lost_and_few_samples_are_kept(count: int) -> None:
    seconds = np.random.default_rng(count).lognormal(0, 2, count).tolist()
    clock = Clock()
    kept = Timeline(Path("/nowhere/timeline.json"), clock)
    kept._written = float("inf")  # this test writes nothing
    kept.begin(rows=7)
    for i, each in enumerate(seconds, 1):
        clock.seconds += each
        kept.add(7 + i, stats(10 * i))
    assert len(kept.samples) <= MOST
    assert sum(sample.seconds for sample in kept.samples) == pytest.approx(sum(seconds))
    assert sum(sample.rows for sample in kept.samples) == len(seconds)
    assert sum(sample.completion_tokens for sample in kept.samples) == 20 * len(seconds)


def test_the_last_sample_ends_with_its_last_row() -> None:
    clock = Clock()
    kept = Timeline(Path("/nowhere/timeline.json"), clock)
    kept._written = float("inf")  # this test writes nothing
    kept.begin(rows=0)
    clock.seconds += 5
    now = time.time()
    kept.add(9, stats(30), ended=clock.seconds - 2)
    assert kept.samples[0].seconds == 3 and kept.samples[0].began == pytest.approx(now - 5, abs=1)
    kept.add(9, stats(30), ended=clock.seconds - 2.5)
    assert kept.samples[1].seconds == 0, "no time runs backwards"


def test_measuring_the_device_is_no_time_of_generating(tmp_path: Path, engine: Callable[[str], str]) -> None:
    job = spec(make_model(tmp_path), write(tmp_path / "in.parquet", prompt=prompts(9)))
    report = run(job, engine("Measures"))
    samples = read_timeline(RunFolder(job.output).timeline)
    assert sum(sample.rows for sample in samples) == 9
    assert sum(sample.seconds for sample in samples) == pytest.approx(report.generate_seconds, abs=0.1)


def test_samples_of_a_long_job_span_about_the_same_time() -> None:
    samples = list[Sample]()
    for i in range(20 * MOST):
        samples.append(Sample(float(i), 1.0, 1, 1, 1, 1.0, 0.5))
        if len(samples) > MOST:
            join_shortest(samples)
    spans = [sample.seconds for sample in samples]
    assert max(spans) <= 4 * 20 and sum(spans) == 20 * MOST
    assert [sample.began for sample in samples] == sorted(sample.began for sample in samples)


def test_joined_gauges_are_means_over_the_time() -> None:
    joined = Sample(5.0, 1.0, 1, 2, 3, 10.0, 0.1) + Sample(9.0, 3.0, 4, 5, 6, 20.0, 0.5)
    assert joined == Sample(5.0, 4.0, 5, 7, 9, 17.5, pytest.approx(0.4))


def test_an_engine_that_replaces_another_counts_no_token_twice(tmp_path: Path) -> None:
    kept = Timeline(tmp_path / "timeline.json")
    kept.begin(0)
    kept.add(3, stats(30))
    kept.begin(3)
    kept.add(5, stats(50))
    assert [sample.prompt_tokens for sample in kept.samples] == [30, 20]


def test_the_file_gives_back_what_was_taken(tmp_path: Path) -> None:
    kept = Timeline(tmp_path / "timeline.json")
    kept.begin(0)
    kept.add(3, stats(30, running=8))
    kept.add(5, stats(70, running=4))
    kept.write()
    assert read_timeline(tmp_path / "timeline.json") == kept.samples
    assert [(s.rows, s.running, s.kv_cache_used) for s in kept.samples] == [(3, 8.0, 0.125), (2, 4.0, 0.0625)]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema_version": 1, "began": [1]}', '{"schema_version": 9}'])
def test_a_damaged_file_is_named_and_begun_anew(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "timeline.json"
    path.write_text(damage)
    with pytest.raises(Refused, match=r"timeline\.json"):
        read_timeline(path)
    kept = Timeline(path)
    assert not kept.samples and "begin with this run" in kept.notes[0]


def test_a_file_that_cannot_be_written_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = Timeline(tmp_path / "away" / "timeline.json")
    kept.begin(0)
    kept.add(3, stats(30))
    kept.write()
    kept.write()
    assert capsys.readouterr().err.count("cannot be written: No such file or directory; the job continues") == 1
