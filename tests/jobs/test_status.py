"""`batchinfer status`: jobs that run, were killed, failed or are complete, from what lies in their run folders."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from beats import BEAT
from command_line import call
from killed_jobs import Job, make_job
from stub_jobs import ENGINES, STUB, prompts, spec, write

from batchinfer.errors import EngineFailed, Refused
from batchinfer.host.process_name import ProcessName
from batchinfer.jobs import status as status_module
from batchinfer.jobs.heartbeat import BEAT_SECONDS, Beat
from batchinfer.jobs.incremental import run_new_rows
from batchinfer.jobs.job import run
from batchinfer.jobs.pace import TimeLeft
from batchinfer.jobs.pulse import LATE_BEATS, Pulse
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.status import Status, print_status, read_status, statuses

ELSEWHERE = replace(ProcessName.own(), host="node7")


@pytest.fixture
def begun(tmp_path: Path) -> Callable[[Beat], Path]:
    """`begun(beat)`: the output of a job whose last beat this is."""

    def make(beat: Beat) -> Path:
        folder = RunFolder(tmp_path / "out.parquet")
        folder.path.mkdir(exist_ok=True)
        (folder.path / "run.json").write_text("{}")
        folder.heartbeat.write_text(json.dumps(asdict(beat)))
        return folder.output

    return make


def test_a_job_that_runs(begun: Callable[[Beat], Path]) -> None:
    status = read_status(begun(replace(BEAT, written=time.time())), Pulse())
    assert (status.state, status.phase, status.host, status.pid) == (
        "running", "generating", os.uname().nodename, os.getpid()
    )  # fmt: skip
    assert set(status.text().splitlines()) > {
        "phase          generating",
        "rows           250 of 1,000 (25.0 %), 3 failed",
        "  null_prompt  1 row",
        "rows/s         2.50",
        "tokens/s       1,234.5",
        "time left      0:05:00 (0:04:10 to 1:06:40)",
        "peak memory    parent 300 MB, engine 1.50 GB",
    }
    assert json.loads(status.json()) == asdict(status)


@pytest.mark.parametrize(
    ("left", "words"),
    [(None, "unknown until a row has ended"), (TimeLeft(90.0, 45.0, None), "0:01:30 (45 s or more)")],
)
def test_what_bounds_nothing_is_said_so(begun: Callable[[Beat], Path], left: TimeLeft | None, words: str) -> None:
    status = read_status(begun(replace(BEAT, written=time.time(), time_left=left)), Pulse())
    assert f"time left      {words}" in status.text().splitlines()


def quick(seconds: list[float]) -> Pulse:
    """One whose clock is put forward by its sleeps; `seconds` is what it shows."""

    def sleep(time: float) -> None:
        seconds[0] += time

    return Pulse(lambda: seconds[0], lambda: seconds[0], sleep)


def test_one_on_another_machine_that_is_silent_is_dead(begun: Callable[[Beat], Path]) -> None:
    output = begun(replace(BEAT, process=ELSEWHERE, written=1000.0))
    status = read_status(output, quick([1000.0 + LATE_BEATS * BEAT_SECONDS + 60]))
    assert status.state == "dead" and status.host == "node7"
    assert re.match(r"no sign of life for 0:01:\d\d: the heartbeat of process \d+ on node7 stands still", status.reason)
    assert "phase          generating" in status.text().splitlines()
    assert read_status(output, quick([1001.0])).state == "running"


def test_one_on_another_machine_whose_clock_is_wrong_runs_if_its_heart_beats(begun: Callable[[Beat], Path]) -> None:
    beat = replace(BEAT, process=ELSEWHERE, written=1000.0)
    output = begun(beat)

    def goes_on(seconds: float) -> None:
        begun(replace(beat, beat=8, written=1002.0, rows_done=260))

    status = read_status(output, Pulse(sleep=goes_on))
    assert (status.state, status.rows_done) == ("running", 260)


def test_one_that_ends_while_it_is_watched_has_ended(begun: Callable[[Beat], Path]) -> None:
    beat = replace(BEAT, process=ELSEWHERE, written=1000.0)
    output = begun(beat)
    stopped = replace(beat, beat=8, exit_code=75, error_class="Interrupted", error="stopped after 260 of 1,000 rows")
    status = read_status(output, Pulse(sleep=lambda _: begun(stopped) and None))
    assert (status.state, status.reason) == ("stopped", "stopped after 260 of 1,000 rows; exit code 75")


def test_a_state_is_named_once(begun: Callable[[Beat], Path]) -> None:
    stopped = replace(BEAT, exit_code=75, error_class="Interrupted", error="stopped after 260 of 1,000 rows")
    failed = replace(BEAT, exit_code=74, error_class="OSError", error="the disk is full")
    said = [read_status(begun(beat), Pulse()).text().splitlines()[1].split(maxsplit=1)[1] for beat in (stopped, failed)]
    assert said == ["stopped after 260 of 1,000 rows; exit code 75", "stopped: the disk is full; exit code 74"]


def test_a_damaged_heartbeat_is_named_and_no_error(begun: Callable[[Beat], Path]) -> None:
    output = begun(BEAT)
    RunFolder(output).heartbeat.write_text('{"schema_version": 1, "beat"')
    status = read_status(output, Pulse())
    assert status.state == "unknown" and "heartbeat.json is damaged" in status.reason
    RunFolder(output).heartbeat.unlink()
    status = read_status(output, Pulse())
    assert status.state == "unknown" and "the same command goes on where it was" in status.reason


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl", "out"])
def test_a_complete_job_is_told_from_its_report(tmp_path: Path, model: Path, name: str) -> None:
    job = spec(model, write(tmp_path / "in.parquet", prompt=[*prompts(9), ""]), output=tmp_path / name)
    report = run(job, STUB)
    for heartbeat in (True, False):
        status = read_status(job.output, Pulse())
        assert status.state == "complete" and (status.rows_done, status.rows_failed) == (10, 1)
        assert (status.seconds, status.rows_per_second) == (report.wall_seconds, report.rows_per_second)
        assert (status.exit_code, status.ended) == (0 if heartbeat else None, report.ended)
        assert f"`batchinfer report {job.output}` has the rest" in status.text()
        RunFolder(job.output).heartbeat.unlink(missing_ok=True)


def test_a_complete_job_that_lost_its_output_or_report(tmp_path: Path, model: Path) -> None:
    job = spec(model, write(tmp_path / "in.parquet", prompt=prompts(9)))
    run(job, STUB)
    folder = RunFolder(job.output)
    report = folder.report.read_text()
    folder.report.write_text("{")
    status = read_status(job.output, Pulse())
    assert (status.state, status.rows_done) == ("complete", 9) and "report.json" in status.reason
    folder.report.write_text(report)
    stopped = asdict(replace(BEAT, phase="canary", exit_code=75, error="stopped during the canary"))
    folder.heartbeat.write_text(json.dumps(stopped))
    status = read_status(job.output, Pulse())
    assert status.state == "stopped" and status.reason.endswith("out.parquet is there, from an earlier run")
    stopped = asdict(replace(BEAT, phase="merging", process=replace(ProcessName.own(), started=1)))
    folder.heartbeat.write_text(json.dumps(stopped))
    assert read_status(job.output, Pulse()).state == "complete", "it was killed before its last beat"
    stopped = asdict(replace(BEAT, phase="done", exit_code=0))
    folder.heartbeat.write_text(json.dumps(stopped))
    job.output.unlink()
    status = read_status(job.output, Pulse())
    assert status.state == "stopped" and "is there no more; the same command writes it again" in status.reason


def test_a_job_that_failed_says_why(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engines_of_the_test.py").write_text(ENGINES)
    monkeypatch.syspath_prepend(tmp_path)
    job = spec(model, write(tmp_path / "in.parquet", prompt=prompts(9)))
    with pytest.raises(EngineFailed) as raised:
        run(job, "engines_of_the_test:break_down")
    status = read_status(job.output, Pulse())
    assert (status.state, status.exit_code, status.error_class) == ("stopped", 70, "EngineFailed")
    assert str(raised.value) in status.reason


def test_of_an_incremental_output_the_file_that_is_run(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def once(n: int) -> None:
        columns = {"id": list(range(n)), "prompt": prompts(n)}
        path = write(tmp_path / "in.parquet", **columns)
        job = spec(model, path, id_column="id", incremental=True, output=tmp_path / "out")
        run_new_rows(job, lambda one: run(one, STUB))

    once(3)
    once(5)
    status = read_status(tmp_path / "out", Pulse())
    assert (status.state, status.output) == ("complete", str(tmp_path / "out" / "part-000002.parquet"))
    assert status.rows == 2
    first = RunFolder(tmp_path / "out" / "part-000001.parquet")
    first.heartbeat.write_text(json.dumps(asdict(replace(BEAT, written=time.time()))))  # as with --retry-errors
    status = read_status(tmp_path / "out", Pulse())
    assert (status.state, status.output) == ("running", str(first.output))


def test_where_no_job_has_begun_it_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    with pytest.raises(Refused, match=r"no job has begun at .*out\.parquet: there is no .*out\.run; give the output"):
        read_status(output, Pulse())
    output.touch()  # somebody's, or what `merge` has written
    with pytest.raises(Refused, match="no job has begun"):
        read_status(output, Pulse())


def test_watching_ends_with_the_job(begun: Callable[[Beat], Path]) -> None:
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        begun(replace(BEAT, rows_done=999, exit_code=None if len(slept) < 3 else 130, error="KeyboardInterrupt"))

    seen = list(statuses(begun(BEAT), sleep))
    assert [status.state for status in seen] == ["running"] * 3 + ["stopped"]
    assert slept == [2.0] * 3


@pytest.mark.parametrize(("terminal", "as_json"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_terminal_is_drawn_again_and_a_file_gets_a_block_each_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool, as_json: bool
) -> None:
    made = [Status("out", "running", "well"), Status("out", "stopped", "\x1b[31mby an error")]
    monkeypatch.setattr(status_module, "statuses", lambda output: iter(made))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    print_status(Path("out"), True, as_json)
    printed = capsys.readouterr().out
    if as_json:
        assert [json.loads(line)["state"] for line in printed.splitlines()] == ["running", "stopped"]
    elif terminal:
        assert printed.count("\x1b[H\x1b[J") == 2 and "\x1b[31m" not in printed
    else:
        assert len(printed.split("\n\n")) == 2 and "\x1b" not in printed


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


def test_a_job_that_is_killed_runs_until_then(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.clear()
    process = job.start()
    while not list(job.output.with_suffix(".run").glob("parts/part-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # it would be complete soon
    seen = read_status(job.output, Pulse())
    assert (seen.state, seen.pid, seen.rows) == ("running", process.pid, 48)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    for _ in range(2):  # while nobody has waited for it, and after
        seen = read_status(job.output, Pulse())
        assert seen.state == "dead" and f"process {process.pid} on this machine is gone" in seen.reason
        process.wait()
    assert call(capsys, "status", job.output, "--watch", "--json") == (0, "")


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, begun: Callable[[Beat], Path]) -> None:
    arguments: list[Any] = ["status", begun(replace(BEAT, exit_code=70, error="the engine died")), "--json"]
    assert call(capsys, *arguments) == (0, "")
    code, said = call(capsys, "status", tmp_path / "other.parquet")
    assert code == 65 and "no job has begun" in said
