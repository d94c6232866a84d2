"""One job has one moment in its prompts, whichever day its rows run, in whichever shard."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from command_line import call
from measured_devices import SHAPE
from stub_jobs import ENGINES, STUB, make_model, prompts, spec, write

from batchinfer.errors import Interrupted, Refused, UsageError
from batchinfer.jobs import template_date
from batchinfer.jobs.cli.main import app
from batchinfer.jobs.incremental import run_new_rows
from batchinfer.jobs.job import run
from batchinfer.jobs.launch import ray_tasks
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.outlook import plan
from batchinfer.jobs.report import Report
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.spec import JobSpec, sharded
from batchinfer.jobs.verify import verify
from batchinfer.kernels.cpu_library import cpu_path

# The engine of these jobs answers with the first 8 tokens of a prompt, each one sign: the date.
DATED = "{{ strftime_now('%Y%m%d') }}{{ messages[0].content }}"
TODAY, TOMORROW = datetime(2026, 11, 28, 23, 59, 50), datetime(2026, 11, 29, 0, 0, 5)
N = 20


def make_dated(folder: Path, template: str = DATED) -> Path:
    folder.mkdir(exist_ok=True)
    (make_model(folder, **SHAPE) / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dated(tmp_path_factory.mktemp("model"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime], None]:
    """`clock(moment)` sets the time; it begins as `TODAY`."""

    def set_to(moment: datetime) -> None:
        monkeypatch.setattr(template_date, "now", lambda: moment)
        monkeypatch.setattr("batchinfer.jobs.preflight.now", lambda: moment)

    set_to(TODAY)
    return set_to


def table(folder: Path, rows: int = N) -> Path:
    return write(folder / "in.parquet", prompt=prompts(rows), id=list(range(rows)))


def job(model: Path, path: Path, **fields: Any) -> JobSpec:
    return spec(model, path, **{"chat": True, "commit_rows": 4, **fields})


def dates(output: Path) -> set[str]:
    return set(pq.read_table(output)["generated_text"].to_pylist())


def notes_of(found: list[str]) -> list[str]:
    return [note for note in found if "template" in note]


def test_a_job_has_the_moment_at_which_it_begins_and_says_so(tmp_path: Path, model: Path, clock: Any) -> None:
    report = run(job(model, table(tmp_path)), STUB)
    assert dates(tmp_path / "out.parquet") == {"20261128"}
    said = "the chat template takes 2026-11-28 23:59:50 for now in every prompt (--template-date)"
    assert notes_of(report.notes) == [said] and said in report.table()
    assert notes_of(plan(job(model, table(tmp_path), overwrite=True)).notes) == [said]
    resolved = json.loads((tmp_path / "out.run" / "run.json").read_text())
    assert resolved["fingerprints"]["template_date"] == TODAY.isoformat()
    verify(tmp_path / "out.parquet")


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[JobSpec], Report]:
    """Runs a job until its first rows are committed, and raises `Interrupted`."""
    (tmp_path / "engines_of_the_test.py").write_text(ENGINES)
    monkeypatch.syspath_prepend(tmp_path)

    def stop(spec: JobSpec) -> Report:
        with monkeypatch.context() as patch:
            commit = RunFolder.commit

            def once(self: RunFolder, finished: Any) -> None:
                commit(self, finished)
                raise Interrupted("stopped")

            patch.setattr(RunFolder, "commit", once)
            return run(spec, "engines_of_the_test:Slow")

    return stop


def run_fingerprints(output: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((RunFolder(output).path / "run.json").read_text())["fingerprints"]
    return found


def test_a_job_that_goes_on_the_next_day_keeps_its_date(tmp_path: Path, model: Path, clock: Any, stopped: Any) -> None:
    begun = job(model, table(tmp_path))
    with pytest.raises(Interrupted):
        stopped(begun)
    clock(TOMORROW)
    assert plan(begun).rows_done
    with pytest.raises(Refused, match="begun with another template_date; give the same command"):
        run(job(model, table(tmp_path), template_date=TOMORROW), STUB)
    report = run(begun, STUB)
    assert 0 < report.rows_resumed < N and dates(begun.output) == {"20261128"}
    assert "takes 2026-11-28 23:59:50 for now" in notes_of(report.notes)[0]
    assert run(begun, STUB).rows == N  # complete already
    run(job(model, table(tmp_path), overwrite=True), STUB)
    assert dates(begun.output) == {"20261129"}


def test_shards_on_two_days_have_the_date_that_they_are_given(tmp_path: Path, model: Path, clock: Any) -> None:
    path, shards = table(tmp_path), [sharded(tmp_path / "out.parquet", i, 2) for i in range(2)]
    for i, moment in enumerate((TODAY, TOMORROW)):
        clock(moment)
        alone = job(model, path, shard=(i, 2), output=shards[i])
        for command in (run, plan):
            with pytest.raises(
                UsageError, match=f"--shard needs --template-date.*as --template-date {moment:%Y-%m-%d}$"
            ):
                command(alone)
        run(job(model, path, shard=(i, 2), output=shards[i], template_date=datetime(2026, 12, 24)), STUB)
        assert run(alone, STUB).rows == N // 2  # complete: it has the moment of its run
    merge_shards(shards, tmp_path / "all.parquet", overwrite=False)
    assert dates(tmp_path / "all.parquet") == {"20261224"}


def test_shards_with_two_dates_do_not_go_together(tmp_path: Path, model: Path) -> None:
    path, shards = table(tmp_path), [sharded(tmp_path / "out.parquet", i, 2) for i in range(2)]
    for i, moment in enumerate((TODAY, TOMORROW)):
        run(job(model, path, shard=(i, 2), output=shards[i], template_date=moment), STUB)
    with pytest.raises(Refused, match=r"belongs to another job than .*: it has another template_date"):
        merge_shards(shards, tmp_path / "all.parquet", overwrite=False)


def test_the_command_of_a_shard_without_a_date_ends_with_2(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [table(tmp_path), "-o", tmp_path / "out.parquet", "--model", model, "--chat", "--shard", "0/2"]
    code, line = call(capsys, "run", *arguments)
    assert code == 2 and "--shard needs --template-date" in line
    assert call(capsys, "run", *arguments, "--template-date", "2026-11-28") == (0, "")


def once(spec: JobSpec) -> Report:
    return run_new_rows(spec, lambda spec: run(spec, STUB))


def test_each_part_of_a_growing_table_has_its_own_date(tmp_path: Path, model: Path, clock: Any) -> None:
    def grown(rows: int, **fields: Any) -> JobSpec:
        path = table(tmp_path, rows)
        return job(model, path, **{"output": tmp_path / "answers", "id_column": "id", "incremental": True, **fields})

    once(grown(10))
    clock(TOMORROW)
    assert once(grown(10)).rows == 10  # nothing new
    assert once(grown(10, template_date=datetime(1999, 1, 1))).rows == 10  # which is for new rows
    assert "takes 2026-11-29 00:00:05" in notes_of(once(grown(15)).notes)[0]
    once(grown(20, template_date=datetime(2026, 12, 24)))
    assert [dates(part) for part in sorted((tmp_path / "answers").iterdir())] == [
        *({"20261128"}, {"20261129"}, {"20261224"}),
    ]
    verify(tmp_path / "answers")


def test_a_part_that_was_begun_keeps_its_date(tmp_path: Path, model: Path, clock: Any, stopped: Any) -> None:
    growing = job(model, table(tmp_path), output=tmp_path / "answers", id_column="id", incremental=True)
    with pytest.raises(Interrupted):
        run_new_rows(growing, stopped)
    clock(TOMORROW)
    table(tmp_path, N + 1)
    once(growing)
    assert [dates(part) for part in sorted((tmp_path / "answers").iterdir())] == [{"20261128"}, {"20261129"}]


@pytest.mark.parametrize("fields", [{"chat": True}, {"chat": False}, {"chat": True, "shard": (0, 1)}])
def test_a_job_without_a_date_in_its_prompts_has_none(tmp_path: Path, fields: dict[str, Any], clock: Any) -> None:
    plain = make_dated(tmp_path / "model", "{{ messages[0].content }}" if fields["chat"] else DATED)
    path = table(tmp_path)
    assert notes_of(run(job(plain, path, **fields), STUB).notes) == []
    before = run_fingerprints(tmp_path / "out.parquet")
    assert "template_date" not in before
    clock(TOMORROW)
    assert run(job(plain, path, **fields), STUB).rows == N
    report = run(job(plain, path, **fields, template_date=TODAY, overwrite=True), STUB)
    said = ["--template-date changes nothing: no chat template writes the date into these prompts"]
    assert notes_of(report.notes) == ([] if "shard" in fields else said)
    assert run_fingerprints(tmp_path / "out.parquet") == before


# The shards of Slurm and Ray.


def slurm_script(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    words = ["slurm", "submit", "--array", "2", "--dry-run", "--", *map(str, arguments)]
    app(words, prog_name="batchinfer", standalone_mode=False)
    return capsys.readouterr().out


def ray_arguments(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> list[str]:
    """What each task of a Ray cluster would be given, without one."""
    given: list[list[str]] = []

    def failing(spec: JobSpec, arguments: list[str], *rest: Any) -> dict[int, ray_tasks.Ended]:
        given.append(arguments)
        return {0: ray_tasks.Ended(65, "stopped here")}

    monkeypatch.setattr(ray_tasks, "run_shards", failing)
    with pytest.raises(Refused, match="stopped here"):
        words = ["ray", "--shards", "2", "--", *map(str, arguments)]
        app(words, prog_name="batchinfer", standalone_mode=False)
    return given[0]


def test_slurm_and_ray_give_all_shards_one_date_and_kind_of_kernels(
    tmp_path: Path, model: Path, clock: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(tmp_path)
    arguments = [path, "-o", tmp_path / "out.parquet", "--model", model, "--chat", "--max-tokens", 8]
    flag = f"--template-date={TODAY.isoformat()}"
    path_flag = f"--cpu-path={cpu_path()}"
    assert f'--shard "$SLURM_ARRAY_TASK_ID/2" {flag} {path_flag} ' in slurm_script(capsys, *arguments)
    assert ray_arguments(monkeypatch, *arguments) == [flag, path_flag, *map(str, arguments)]
    clock(TOMORROW)
    assert TOMORROW.isoformat() in slurm_script(capsys, *arguments)
    # The arguments make the shard that they are meant to make.
    call(capsys, "run", "--shard", "1/2", *[flag, *arguments])
    assert dates(sharded(tmp_path / "out.parquet", 1, 2)) == {"20261128"}
    # Once a shard was begun, the same command gives the others its date.
    assert flag in slurm_script(capsys, *arguments)
    assert ray_arguments(monkeypatch, *arguments)[0] == flag
    # What the user gives counts, and a job without chats needs none.
    assert flag not in slurm_script(capsys, *arguments, "--template-date", "2020-01-01")
    assert "--template-date" not in slurm_script(capsys, *arguments[:-3])
    assert "--template-date" not in ray_arguments(monkeypatch, *arguments[:-3])


def test_cron_starts_each_run_with_its_own_date(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["cron", "--schedule", "0 3 * * *", "--", "in.parquet", "-o", str(tmp_path / "o"), "--model", "m", "--chat"]
    app(words, prog_name="batchinfer", standalone_mode=False)
    assert "--template-date" not in capsys.readouterr().out
