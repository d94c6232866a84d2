"""Jobs that go on where an earlier process of the same command ended, and those that must not."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stub_jobs import SCRIPT, STUB, counts, expected, limit, make_model, prompts, recount, spec, write

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Interrupted, Refused, UsageError
from batchinfer.jobs.flag_values import seconds_of
from batchinfer.jobs.job import run
from batchinfer.jobs.process import interruption
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.rows.windows import Limits
from batchinfer.jobs.timeline import read_timeline
from batchinfer.jobs.verify import verify

N = 400


def stop_after(folder: Path, command: list[str], parts: int, number: signal.Signals) -> int:
    """Start a job, send it a signal when it has committed so many parts more; its exit code."""
    had = len(list((folder / "out.run" / "parts").glob("*")))
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((folder / "out.run" / "parts").glob("*"))) < had + parts and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait(timeout=60)


def test_the_same_command_goes_on_and_the_output_is_that_of_an_undisturbed_run(
    tmp_path: Path, model: Path, engine: Callable[[str], str]
) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(N))
    (tmp_path / "main.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, tmp_path / "main.py", tmp_path, "run", path, "-o", tmp_path / "out.parquet"]
    command = [*map(str, command), "--model", str(model), "--commit-rows", "20", "--max-tokens", "8"]
    assert stop_after(tmp_path, command, 2, signal.SIGTERM) == 75
    assert stop_after(tmp_path, command, 2, signal.SIGKILL) == -signal.SIGKILL
    assert not (tmp_path / "out.parquet").exists()
    before = RunFolder(tmp_path / "out.parquet")
    committed = sum(pq.read_metadata(part).num_rows for part in (before.path / "parts").glob("*"))
    assert 80 <= committed < N
    report = run(spec(model, path, commit_rows=20), STUB)
    assert (report.rows_resumed, report.rows_computed) == (committed, N - committed)
    assert counts(report) == recount(tmp_path / "out.parquet") and report.rows == N
    assert pq.read_table(tmp_path / "out.parquet")["generated_text"].to_pylist() == expected(model, prompts(N))
    assert f"{committed} of the rows were done when this run began" in report.notes[0]
    samples = read_timeline(before.timeline)  # the run that was killed had none yet
    assert len(samples) >= 2 and samples[0].rows >= 40
    assert N - committed <= sum(sample.rows for sample in samples) - samples[0].rows + 40 <= N


def test_a_complete_job_computes_nothing_again(tmp_path: Path, model: Path, engine: Callable[[str], str]) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(9))
    first = run(spec(model, path), STUB)
    written = (tmp_path / "out.parquet").stat().st_mtime_ns
    assert run(spec(model, path), engine("refuse")) == first
    assert (tmp_path / "out.parquet").stat().st_mtime_ns == written


def test_where_only_the_merge_is_left_no_model_is_loaded(
    tmp_path: Path, model: Path, engine: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(9))

    def killed(self: RunFolder, aside: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            run(spec(model, path), STUB)
    assert not (tmp_path / "out.parquet").exists()
    report = run(spec(model, path), engine("refuse"))
    assert (report.rows_resumed, report.rows_computed) == (9, 0)
    assert recount(tmp_path / "out.parquet") == counts(report)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sampling": SamplingParams(max_tokens=9)}, "sampling"),
        ({"seed": 7}, "sampling"),
        ({"quantization": "w8a8-int8"}, "quantization"),
        ({"prompt_column": None, "prompt_template": "{prompt}"}, "template, column or flag for prompts or ids"),
        ({"columns": ("prompt",)}, "columns"),
        ({"prompt_column": "id"}, "template, column or flag for prompts or ids"),
    ],
)
def test_another_command_is_refused_by_what_differs(
    tmp_path: Path, model: Path, fields: dict[str, Any], named: str
) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(9), id=[str(i) for i in range(9)])
    run(spec(model, path), STUB)
    with pytest.raises(Refused, match=rf"out\.run was begun with another {named}; .* or give --overwrite"):
        run(spec(model, path, **fields), STUB)
    assert recount(tmp_path / "out.parquet")["rows"] == 9


def test_another_input_model_or_tokenizer_is_refused(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(9))
    run(spec(model, path), STUB)
    write(path, prompt=[*prompts(8), "another"])
    with pytest.raises(Refused, match="begun with another input;"):
        run(spec(model, path), STUB)
    other = make_model(tmp_path)
    (other / "config.json").write_text(json.dumps({**json.loads((other / "config.json").read_text()), "x": 1}))
    write(path, prompt=prompts(9))
    with pytest.raises(Refused, match="begun with another model;"):
        run(spec(other, path), STUB)
    run(spec(other, path, overwrite=True), STUB)


def test_rows_that_failed_run_again_only_if_asked(tmp_path: Path, model: Path, engine: Callable[[str], str]) -> None:
    path = write(tmp_path / "in.parquet", prompt=[*prompts(9), None])
    first = run(spec(model, path), engine("Fails"))
    assert first.rows_by_error == {"not_finite": 4, "null_prompt": 1}
    assert run(spec(model, path), STUB) == first
    report = run(spec(model, path, retry_errors=True), STUB)
    assert report.rows_by_error == {"null_prompt": 1} and (report.rows_resumed, report.rows_computed) == (5, 5)
    assert counts(report) == recount(tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["generated_text"].to_pylist()[:9] == expected(model, prompts(9))


def test_no_resume_begins_only_in_an_empty_place(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(3))
    run(spec(model, path, resume=False), STUB)
    with pytest.raises(Refused, match="exists, and --no-resume starts only a new job"):
        run(spec(model, path, resume=False), STUB)
    (tmp_path / "out.parquet").unlink()
    with pytest.raises(Refused, match="exists, and --no-resume starts only a new job"):
        run(spec(model, path, resume=False), STUB)
    run(spec(model, path, resume=False, overwrite=True), STUB)


def test_a_run_that_was_killed_before_it_began_is_begun(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(3))
    (tmp_path / "out.run").mkdir()
    for name in ("lock", "run.json.tmp"):
        (tmp_path / "out.run" / name).write_text("{")
    assert run(spec(model, path), STUB).rows_computed == 3


def test_rows_of_later_windows_are_found_again(
    tmp_path: Path, model: Path, engine: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows that are done in whole, in part and not at all."""
    limit(monkeypatch, Limits(slice_rows=32, window_rows=64))
    path = write(tmp_path / "in.parquet", prompt=prompts(N))
    run(spec(model, path, commit_rows=1), STUB)
    folder = tmp_path / "out.run" / "parts"
    parts = sorted(folder.iterdir())
    assert len(parts) == 7
    for gone in (parts[1], parts[2], parts[6]):
        gone.unlink()
    (tmp_path / "out.parquet").unlink()
    report = run(spec(model, path, commit_rows=1), STUB)
    assert report.rows_computed == 64 + 64 + N % 64
    assert pq.read_table(tmp_path / "out.parquet")["generated_text"].to_pylist() == expected(model, prompts(N))


def test_the_clock_ends_a_job_as_a_signal_does(tmp_path: Path, model: Path, engine: Callable[[str], str]) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(N))
    with pytest.raises(Interrupted, match=r"stopped after \d+ of 400 rows; they are committed in"):
        run(spec(model, path, commit_rows=20, time_limit=2.0), engine("Slow"))
    assert not (tmp_path / "out.parquet").exists()
    report = run(spec(model, path, commit_rows=20, time_limit=60.0), STUB)
    assert report.rows_resumed > 0 and report.rows == N


def test_signals_at_once_are_one_and_a_later_one_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that signals all processes of a job, and a launcher among them that hands it on."""
    clock, after = [100.0], []
    monkeypatch.setattr(interruption.time, "monotonic", lambda: clock[0])
    before = signal.signal(signal.SIGTERM, lambda number, frame: after.append(number))
    try:
        with interruption.Interruption() as stop:
            assert not stop.requested
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
            assert stop.requested and not after
            clock[0] += interruption.SAME_SECONDS + 0.1
            signal.raise_signal(signal.SIGTERM)
            assert after == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2", 120), ("1:30", 90), ("2:00:05", 7205), ("1-0", 86400), ("1-2:30", 86400 + 9000), ("0-0:0:7", 7)],
)
def test_times_are_those_of_slurm(text: str, seconds: float) -> None:
    assert seconds_of("--time-limit", text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "-5", "1:2:3:4", "1.5", "x-1", "1-"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--time-limit is "):
        seconds_of("--time-limit", text)


@pytest.mark.parametrize("at", ["merge", "publish"])
def test_rows_that_ran_again_reach_the_output_though_the_run_was_killed_before_that(
    tmp_path: Path, model: Path, engine: Callable[[str], str], at: str
) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(N))
    assert run(spec(model, path), engine("Fails")).rows_failed == N // 2

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    again = spec(model, path, retry_errors=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, at, killed)
        run(again, STUB)
    assert run(again, STUB).rows_failed == 0
    assert pq.read_table(tmp_path / "out.parquet")["error_code"].null_count == N
    verify(tmp_path / "out.parquet")


def test_too_many_errors_are_so_in_the_next_run_too(tmp_path: Path, model: Path) -> None:
    texts = [None if i % 2 else text for i, text in enumerate(prompts(40))]
    path = write(tmp_path / "in.parquet", prompt=texts)
    for _ in range(2):
        with pytest.raises(Refused, match="20 of 40 rows failed"):
            run(spec(model, path, max_error_rate=0.1), STUB)
    assert not (tmp_path / "out.parquet").exists()
    assert run(spec(model, path), STUB).rows_failed == 20


def test_nulls_that_only_a_later_file_may_have(tmp_path: Path, model: Path) -> None:
    first, second = tmp_path / "1.parquet", write(tmp_path / "2.parquet", prompt=["b", None])
    pq.write_table(pa.table({"prompt": ["a"]}, pa.schema([pa.field("prompt", pa.string(), nullable=False)])), first)
    assert run(spec(model, first, second), STUB).rows_by_error == {"null_prompt": 1}
    assert pq.read_table(tmp_path / "out.parquet")["prompt"].to_pylist() == ["a", "b", None]


def test_the_clock_ends_a_job_whose_engine_still_loads(
    tmp_path: Path, model: Path, engine: Callable[[str], str]
) -> None:
    """The first window is more than a pipe holds."""
    path = write(tmp_path / "in.parquet", prompt=[f"{i} " + "x" * 40 for i in range(20_000)])
    started = time.monotonic()
    with pytest.raises(Interrupted, match="stopped after 0 of 20,000 rows"):
        run(spec(model, path, time_limit=4.0, grace=1.0), engine("load_for_a_minute"))
    assert time.monotonic() - started < 50
