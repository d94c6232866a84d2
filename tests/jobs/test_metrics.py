"""The textfile for node_exporter, read by prometheus_client: what it says, however the job ends."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import parser
from stub_jobs import STUB, prompts, recount, spec, write

from batchinfer.errors import EngineFailed, Interrupted, Refused, exit_code
from batchinfer.jobs.job import run
from batchinfer.jobs.metrics import Metrics
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.spec import JobSpec

OF_ROWS = {"rows", "rows_done", "rows_failed", "prompt_tokens_total", "completion_tokens_total"}


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Callable[..., JobSpec]:
    """`job(prompts, **fields)`: one that writes metrics."""

    def make(texts: list[str | None], **fields: Any) -> JobSpec:
        path = write(tmp_path / "in.parquet", prompt=texts)
        return spec(model, path, **{"metrics_textfile": tmp_path / "job.prom", **fields})

    return make


def read(path: Path) -> tuple[dict[str, float], set[str]]:
    """(value by metric's name without prefix, the outputs that they are about)."""
    text = path.read_bytes().decode()
    families = list(parser.text_string_to_metric_families(text))
    samples = [sample for family in families for sample in family.samples]
    assert len({sample.name for sample in samples}) == len(samples) == len(families), "one sample each"
    assert all(family.documentation for family in families)
    assert {family.type for family in families} <= {"counter", "gauge"}
    assert {s.name for f in families for s in f.samples if f.type == "counter"} == {
        s.name for s in samples if s.name.endswith("_total")
    }
    assert all(set(sample.labels) == {"output"} and sample.timestamp is None for sample in samples)
    values = {sample.name.removeprefix("batchinfer_job_"): sample.value for sample in samples}
    return values, {sample.labels["output"] for sample in samples}


def test_a_complete_job(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    before = time.time()
    run(job(["good", None, "fine, and longer than the others", ""]), STUB)
    values, outputs = read(tmp_path / "job.prom")
    counted = recount(tmp_path / "out.parquet")
    assert outputs == {str(tmp_path / "out.parquet")}
    assert (values["rows"], values["rows_done"], values["rows_failed"]) == (4, 4, 2)
    assert values["prompt_tokens_total"] == counted["prompt_tokens"] > 0
    assert values["completion_tokens_total"] == counted["completion_tokens"] > 0
    assert (values["running"], values["exit_code"]) == (0, 0)
    assert before <= values["start_time_seconds"] <= values["last_success_time_seconds"] <= time.time()
    assert values["seconds"] > 0


def test_a_job_at_work_has_no_exit_code_yet(
    tmp_path: Path, job: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    write = Metrics.write

    def looked_at(self: Metrics) -> None:
        write(self)
        seen.append(read(tmp_path / "job.prom")[0])

    monkeypatch.setattr(Metrics, "write", looked_at)
    run(job(prompts(5)), STUB)
    assert (seen[0]["running"], seen[0]["rows"], seen[0]["rows_done"]) == (1, 5, 0)
    assert not {"exit_code", "last_success_time_seconds"} & seen[0].keys()


@pytest.mark.parametrize(
    ("fields", "name", "error", "code"),
    [
        ({"time_limit": 0.001}, "Slow", Interrupted, 75),
        ({"max_error_rate": 0.0}, "Slow", Refused, 65),
        ({}, "break_down", EngineFailed, 70),
        ({}, "refuse", Refused, 65),
    ],
)
def test_a_run_that_fails_keeps_the_last_success(
    tmp_path: Path,
    job: Callable[..., JobSpec],
    engine: Callable[[str], str],
    fields: dict[str, Any],
    name: str,
    error: type[Exception],
    code: int,
) -> None:
    run(job(["before", "others"]), STUB)
    success = read(tmp_path / "job.prom")[0]["last_success_time_seconds"]
    with pytest.raises(error):
        run(job([*prompts(40), ""], overwrite=True, **fields), engine(name))
    values, _ = read(tmp_path / "job.prom")
    assert (values["running"], values["exit_code"], values["rows"]) == (0, code, 41)
    assert values["last_success_time_seconds"] == success < values["start_time_seconds"]


def test_a_run_that_is_refused_before_it_begins_says_so_without_rows(
    tmp_path: Path, job: Callable[..., JobSpec]
) -> None:
    run(job(["before"]), STUB)
    success = read(tmp_path / "job.prom")[0]["last_success_time_seconds"]
    with pytest.raises(Refused):
        run(job(["before"], prompt_column="text"), STUB)
    values, _ = read(tmp_path / "job.prom")
    assert (values["exit_code"], values["last_success_time_seconds"]) == (65, success)
    assert not OF_ROWS & values.keys()


def test_every_row_failed_is_no_success(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    run(job(["", None]), STUB)
    values, _ = read(tmp_path / "job.prom")
    assert (values["exit_code"], values["rows_failed"]) == (65, 2)
    assert "last_success_time_seconds" not in values


def test_a_job_that_is_complete_already_succeeds_again(
    tmp_path: Path, job: Callable[..., JobSpec], engine: Callable[[str], str]
) -> None:
    run(job(prompts(3), metrics_textfile=None), STUB)
    assert not list(tmp_path.glob("*.prom"))
    # The file is in no fingerprint: the engine that refuses is not asked for.
    run(job(prompts(3)), engine("refuse"))
    values, _ = read(tmp_path / "job.prom")
    assert (values["exit_code"], values["rows"], values["rows_done"]) == (0, 3, 3)


def test_the_file_of_a_run_at_work_is_left_alone(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    first = RunFolder(tmp_path / "out.parquet")
    first.open({}, {}, 1, False, False)
    (tmp_path / "job.prom").write_text("# of the first\n")
    for fields in ({}, {"prompt_column": "text"}):
        with pytest.raises((Interrupted, Refused)):
            run(job(["a"], **fields), STUB)
        assert (tmp_path / "job.prom").read_text() == "# of the first\n"
    first.close()
    with pytest.raises(Refused):
        run(job(["a"], prompt_column="text"), STUB)
    assert read(tmp_path / "job.prom")[0]["exit_code"] == 65


@pytest.mark.parametrize("name", ['a "b" \\ c\nd\\n.parquet', "größe {x} 1.parquet", "\r\x1b[2J.parquet"])
def test_any_name_of_an_output_is_a_label(tmp_path: Path, job: Callable[..., JobSpec], name: str) -> None:
    run(job(["a"], output=tmp_path / name), STUB)
    run(job(["a"], output=tmp_path / name), STUB)
    values, outputs = read(tmp_path / "job.prom")
    assert outputs == {str(tmp_path / name)}
    assert values["exit_code"] == 0 and "last_success_time_seconds" in values


def test_bytes_of_a_name_that_are_no_utf8_are_escaped(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    with pytest.raises(Refused):
        run(job(["a"], output=tmp_path / os.fsdecode(b"\xff.parquet"), prompt_column="text"), STUB)
    assert read(tmp_path / "job.prom")[1] == {str(tmp_path / r"\udcff.parquet")}


def test_the_last_success_is_found_behind_any_name(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    run(job(["a"], output=tmp_path / 'x" 5\n} 7.parquet'), STUB)
    success = read(tmp_path / "job.prom")[0]["last_success_time_seconds"]
    with pytest.raises(Refused):
        run(job(["a"], prompt_column="text"), STUB)
    assert read(tmp_path / "job.prom")[0]["last_success_time_seconds"] == success


def test_a_missing_folder_is_refused_before_any_work(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    with pytest.raises(Refused, match=r"--metrics-textfile .*x/job\.prom: there is no folder .*x; make it"):
        run(job(["a"], metrics_textfile=tmp_path / "x" / "job.prom"), STUB)
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_a_file_that_cannot_be_written_is_said_once_and_the_job_goes_on(
    tmp_path: Path, job: Callable[..., JobSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.prom.tmp").mkdir()
    report = run(job(prompts(3)), STUB)
    assert report.rows_ok == 3
    said = [line for line in capsys.readouterr().err.splitlines() if "--metrics-textfile" in line]
    assert len(said) == 1 and said[0].endswith("; the job continues")
    assert not (tmp_path / "job.prom").exists()


def test_the_file_may_be_read_by_others(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    run(job(["a"]), STUB)
    assert (tmp_path / "job.prom").stat().st_mode & 0o044 == 0o044
    assert not list(tmp_path.glob("*.tmp"))


def test_exit_codes_of_errors() -> None:
    assert exit_code(None) == 0
    assert exit_code(PermissionError(13, "no")) == 74
    assert exit_code(KeyboardInterrupt()) == 130
    assert exit_code(KeyError("a bug")) == 70
