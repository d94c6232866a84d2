"""The heartbeat of a job: what it says in each phase, and what it leaves behind."""

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stub_jobs import STUB, prompts, spec, write

from batchinfer.errors import EngineFailed, Interrupted, Refused
from batchinfer.host.process_name import ProcessName
from batchinfer.jobs import heartbeat as heartbeat_module
from batchinfer.jobs import job as job_module
from batchinfer.jobs.canary import Canary
from batchinfer.jobs.heartbeat import Beat, Heartbeat, read_beat
from batchinfer.jobs.job import run
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.run_state import RunState
from batchinfer.jobs.spec import JobSpec


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Callable[..., JobSpec]:
    def make(texts: list[str | None], **fields: Any) -> JobSpec:
        return spec(model, write(tmp_path / "in.parquet", prompt=texts), **fields)

    return make


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> list[Beat]:
    """All that jobs write from here on, read back from the file."""
    seen: list[Beat] = []
    write = heartbeat_module.Heartbeat.write

    def looked_at(self: Heartbeat) -> None:
        write(self)
        if (beat := read_beat(self._folder.heartbeat)) is not None and beat not in seen:
            seen.append(beat)

    monkeypatch.setattr(heartbeat_module.Heartbeat, "write", looked_at)
    return seen


def last(tmp_path: Path) -> Beat:
    beat = read_beat(tmp_path / "out.run" / "heartbeat.json")
    assert beat is not None
    return beat


def test_each_phase_begins_with_a_beat_and_the_last_one_says_how_it_ended(
    tmp_path: Path, job: Callable[..., JobSpec], beats: list[Beat]
) -> None:
    before = time.time()
    report = run(job([*prompts(40), None, ""]), STUB)
    phases = [beat.phase for beat in beats]
    assert list(dict.fromkeys(phases)) == ["reading", "loading", "generating", "merging", "done"]
    assert [beat.beat for beat in beats] == list(range(1, len(beats) + 1))
    assert {beat.process for beat in beats} == {ProcessName.own()}
    assert all(before <= beat.started <= beat.written <= time.time() and beat.rows == 42 for beat in beats)
    assert {beat.exit_code for beat in beats[:-1]} == {None}
    assert beats[0].rows_done == 0 and beats[0].rows_per_second is None and beats[0].last_commit is None
    end = beats[-1]
    assert (end.exit_code, end.error_class, end.error) == (0, None, None)
    assert (end.rows_done, end.rows_failed, end.rows_by_error) == (42, 2, report.rows_by_error)
    assert (end.prompt_tokens, end.completion_tokens) == (report.prompt_tokens, report.completion_tokens)
    assert end.rows_per_second is not None and end.rows_per_second > 0
    assert end.peak_memory_bytes.keys() == {"parent", "engine"} and min(end.peak_memory_bytes.values()) > 10**6
    assert end.last_commit is not None and before <= end.last_commit <= end.written
    assert not list((tmp_path / "out.run").glob("*.tmp"))


def test_a_canary_has_a_beat_of_its_own_and_is_told_of(
    tmp_path: Path,
    job: Callable[..., JobSpec],
    beats: list[Beat],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run_canary(comparison: object, interruption: object, tick: Callable[[], None]) -> Canary:
        tick()
        assert RunFolder(tmp_path / "out.parquet").taken
        return Canary(1, "", 1, 1.0, 1, 1.0, 0.0, 0.1)

    monkeypatch.setattr(job_module, "run_canary", run_canary)
    monkeypatch.setattr("batchinfer.jobs.progress.LINE_SECONDS", 1e-9)
    run(job(prompts(5), canary=1, quantization="w8a8-int8"), STUB)
    assert [beat.phase for beat in beats][:2] == ["canary", "reading"]
    assert "batchinfer: canary: 0 of 5 rows\n" in capsys.readouterr().err


def test_a_canary_that_fails_leaves_nothing_of_its_own_and_all_that_was_there(
    tmp_path: Path, job: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_canary(*_: object) -> Canary:
        assert last(tmp_path).phase == "canary"
        raise EngineFailed("the canary died")

    monkeypatch.setattr(job_module, "run_canary", run_canary)
    quantized = {"canary": 1, "quantization": "w8a8-int8"}
    for left in (False, True):
        if left:  # by a run that was killed in its canary
            (tmp_path / "out.run").mkdir()
            for name in ("lock", "heartbeat.json", "heartbeat.json.tmp"):
                (tmp_path / "out.run" / name).touch()
        with pytest.raises(EngineFailed):
            run(job(prompts(5), **quantized), STUB)
        assert not (tmp_path / "out.run").exists()
    run(job(prompts(5)), STUB)
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(EngineFailed):
        run(job(prompts(5), **quantized, overwrite=True), STUB)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == files
    assert (last(tmp_path).phase, last(tmp_path).error) == ("canary", "the canary died")


@pytest.mark.parametrize(
    ("fields", "name", "error", "code"),
    [
        ({"max_error_rate": 0.0}, "Slow", Refused, 65),
        ({}, "break_down", EngineFailed, 70),
    ],
)
def test_a_job_that_fails_says_so(
    tmp_path: Path,
    job: Callable[..., JobSpec],
    engine: Callable[[str], str],
    fields: dict[str, Any],
    name: str,
    error: type[Exception],
    code: int,
) -> None:
    with pytest.raises(error) as raised:
        run(job([*prompts(20), ""], **fields), engine(name))
    end = last(tmp_path)
    assert (end.exit_code, end.error_class, end.error) == (code, error.__name__, str(raised.value))


def test_every_row_failed_is_a_failure(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    run(job(["", None]), STUB)
    end = last(tmp_path)
    assert (end.phase, end.exit_code, end.error) == ("done", 65, "every row failed")


def test_a_run_that_is_refused_or_has_nothing_to_do_writes_none(
    tmp_path: Path, job: Callable[..., JobSpec], engine: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Refused):
        run(job(["a"]), engine("refuse"))
    assert not (tmp_path / "out.run").exists() and "heartbeat" not in capsys.readouterr().err
    run(job(["a"]), STUB)
    before = (tmp_path / "out.run" / "heartbeat.json").read_bytes()
    run(job(["a"]), engine("refuse"))  # complete already
    with pytest.raises(Refused):
        run(job(["b"]), STUB)
    held = RunFolder(tmp_path / "out.parquet")
    held.take()
    with pytest.raises(Interrupted):
        run(job(["a"], overwrite=True), STUB)
    held.close()
    assert (tmp_path / "out.run" / "heartbeat.json").read_bytes() == before


def test_a_heartbeat_that_cannot_be_written_is_said_once_and_the_job_goes_on(
    tmp_path: Path, job: Callable[..., JobSpec], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(heartbeat_module, "replace_unsynced", full)
    assert run(job(prompts(3)), STUB).rows_ok == 3
    said = [line for line in capsys.readouterr().err.splitlines() if "heartbeat.json" in line]
    assert len(said) == 1 and said[0].endswith("cannot be written: No space left on device; the job continues")


def test_a_beat_is_due_every_two_seconds(tmp_path: Path) -> None:
    now = 1000.0
    folder = RunFolder(tmp_path / "out.parquet")
    folder.path.mkdir()
    heartbeat = Heartbeat(folder, RunState(lambda: now))
    heartbeat.tick()
    assert not folder.heartbeat.exists(), "before it begins it writes nothing"
    heartbeat.begin("reading")
    numbers = []
    for quarter in range(1, 21):
        now = 1000.0 + quarter / 4
        heartbeat.tick()
        numbers.append(json.loads(folder.heartbeat.read_text())["beat"])
    assert numbers == [1] * 7 + [2] * 8 + [3] * 5


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": 1}', '{"schema_version": 1, "x": 2}'])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "heartbeat.json"
    path.write_text(text)
    with pytest.raises(Refused, match=r"heartbeat\.json is damaged"):
        read_beat(path)
    path.write_bytes(os.urandom(200))
    with pytest.raises(Refused):
        read_beat(path)
    path.write_text('{"schema_version": 2}')
    with pytest.raises(Refused, match="has schema_version 2; this batchinfer reads only 1"):
        read_beat(path)
    path.unlink()
    assert read_beat(path) is None


def test_a_file_that_was_replaced_while_it_was_opened_over_nfs_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "heartbeat.json"
    path.write_text('{"schema_version": 2}')
    read, fails = Path.read_bytes, [OSError(errno.ESTALE, "Stale file handle")] * 2

    def stale(self: Path) -> bytes:
        if fails:
            raise fails.pop()
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(Refused, match="has schema_version 2"):
        read_beat(path)
    fails += [OSError(errno.ESTALE, "Stale file handle")] * 9
    with pytest.raises(OSError, match="Stale"):
        read_beat(path)
