"""What a job says while it runs: a line a minute in a log file, a bar on a terminal."""

import json
import re
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from stub_jobs import ENGINES, prompts, spec, write

from batchinfer.engine.config import EngineStats
from batchinfer.jobs import progress
from batchinfer.jobs.collector import Results
from batchinfer.jobs.heartbeat import Heartbeat
from batchinfer.jobs.job import run
from batchinfer.jobs.log import printable, say, write_as
from batchinfer.jobs.metrics import Metrics
from batchinfer.jobs.progress import Progress
from batchinfer.jobs.results.done import Done
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.run_state import RunState
from batchinfer.text.tokenizer import Tokenizer

TOTAL = 100


@dataclass
class Clock:
    """A clock that is put forward by hand."""

    seconds: float = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def results(tmp_path: Path, model: Path) -> Results:
    """Of a job of which 20 rows were done before."""
    job = spec(model, tmp_path / "in.parquet", metrics_textfile=tmp_path / "job.prom")
    done = Done(np.arange(TOTAL) < 20, by_reason={"stop": 20})
    return Results(job, Tokenizer.load(model), RunFolder(job.output), done)


@pytest.fixture
def watched(tmp_path: Path, results: Results) -> tuple[Progress, Clock]:
    clock = Clock()
    job = spec(tmp_path, tmp_path / "in.parquet", metrics_textfile=tmp_path / "job.prom")
    folder, state = RunFolder(job.output), RunState(clock)
    state.results, state.rows = results, TOTAL
    metrics = Metrics(job, folder, state)
    metrics.write()
    return Progress(state, metrics, Heartbeat(folder, state)), clock


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was said, without the times."""
    said = capsys.readouterr().err.splitlines()
    for line in said:
        assert datetime.fromisoformat(line.split(" ", 1)[0]).utcoffset() is not None
    return [line.split(" ", 1)[1] for line in said]


def test_a_line_each_minute_whether_anything_moved_or_not(
    capsys: pytest.CaptureFixture[str], results: Results, watched: tuple[Progress, Clock]
) -> None:
    seen, clock = watched
    said = []
    for second in range(601):
        clock.seconds = 1000.0 + second
        if second == 90:
            seen.enter("loading")
        if second == 150:
            seen.generating()
        if second == 200:
            results.by_reason["stop"] += 30
            seen.update(EngineStats(prompt_tokens=300, completion_tokens=700))
        seen.tick()
        said += [(second, line) for line in lines(capsys)]
    assert [second for second, _ in said] == list(range(60, 601, 60))
    assert said[0] == (60, "batchinfer: reading: 20 of 100 rows")
    assert said[1] == (120, "batchinfer: loading: 20 of 100 rows")
    assert said[2] == (180, "batchinfer: generating: 20 of 100 rows, 0 tok/s, ? left")
    # 30 rows and 1,000 tokens in 90 s: 50 rows more take 150 s.
    assert said[3] == (240, "batchinfer: generating: 50 of 100 rows, 11 tok/s, 02:30 left")
    assert said[9] == (600, "batchinfer: generating: 50 of 100 rows, 2 tok/s, 12:30 left")


def test_minutes_that_nobody_looked_are_one_line_and_the_next_comes_on_time(
    capsys: pytest.CaptureFixture[str], watched: tuple[Progress, Clock]
) -> None:
    seen, clock = watched
    said = []
    for second in (59, 200, 239, 240, 299, 300):
        clock.seconds = 1000.0 + second
        seen.tick()
        said += [second for _ in lines(capsys)]
    assert said == [200, 240, 300]


def test_the_merge_is_watched_and_gets_all_that_it_merges(
    capsys: pytest.CaptureFixture[str], watched: tuple[Progress, Clock]
) -> None:
    seen, clock = watched
    merged = []
    for item in seen.merging("abc"):
        merged.append(item)
        clock.seconds += 45
    assert merged == ["a", "b", "c"]
    assert lines(capsys) == ["batchinfer: merging: 20 of 100 rows"]


def test_metrics_are_written_with_each_line(tmp_path: Path, watched: tuple[Progress, Clock]) -> None:
    seen, clock = watched
    (tmp_path / "job.prom").unlink()
    seen.tick()
    assert not (tmp_path / "job.prom").exists()
    clock.seconds += 60
    seen.tick()
    assert "batchinfer_job_rows_done" in (tmp_path / "job.prom").read_text()


def test_a_terminal_gets_a_bar_and_no_lines(
    capsys: pytest.CaptureFixture[str], watched: tuple[Progress, Clock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, clock = watched
    (tmp_path / "job.prom").unlink()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    seen.generating()
    clock.seconds += 60
    seen.tick()
    assert "20/100" in capsys.readouterr().err
    assert (tmp_path / "job.prom").exists()
    say("a word")
    assert capsys.readouterr().err == "batchinfer: a word\n"
    seen.close()


def test_what_is_said_is_one_line_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\nb\r\x1b[2J\x00\x85\u2028\u202e\udcff Zürich 東京")
    assert lines(capsys) == [r"batchinfer: a\nb\r\x1b[2J\x00\x85\u2028\u202e\udcff Zürich 東京"]
    assert printable("a  b\tc") == r"a  b\tc"


LATE = """
class Late(Slow):
    def __init__(self, config, tokenizer):
        time.sleep(1)
        super().__init__(config, tokenizer)
"""


def test_a_job_is_heard_of_while_it_loads_generates_and_merges(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 1e-9)  # at every chance
    (tmp_path / "engines_of_this_test.py").write_text(ENGINES + LATE)
    monkeypatch.syspath_prepend(tmp_path)
    run(spec(model, write(tmp_path / "in.parquet", prompt=prompts(20))), "engines_of_this_test:Late")
    said = lines(capsys)
    phases = [found[1] for line in said if (found := re.match(r"batchinfer: (\w+): \d+ of 20 rows", line))]
    assert list(dict.fromkeys(phases)) == ["reading", "loading", "generating", "merging"]
    assert phases.count("loading") > 2
    assert said[-1] == "batchinfer: merging: 20 of 20 rows"


def test_a_line_as_json_has_its_figures(
    watched: tuple[Progress, Clock], results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, clock = watched
    write_as("json")
    try:
        shown.generating()
        results.by_reason["stop"] += 40
        clock.seconds += 80
        shown.update(EngineStats(prompt_tokens=700, completion_tokens=100))
        shown.tick()
    finally:
        write_as("text")
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["level"], line["rows_done"], line["rows_total"]) == ("generating", "info", 60, 100)
    assert (line["tokens_per_second"], line["seconds_left"]) == (10.0, 80.0)
