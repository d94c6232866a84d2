"""Outputs that are a folder of Parquet files: whole or absent, like a file."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from stub_jobs import STUB, expected, make_model, prompts, spec, write

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.job import run
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.report import Report
from batchinfer.jobs.results import output_writer
from batchinfer.jobs.results.run_folder import RunFolder, incremental_files
from batchinfer.jobs.spec import JobSpec, sharded
from batchinfer.jobs.verify import verify

N = 3000


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def job(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    """One whose output has several files."""
    monkeypatch.setattr(output_writer, "FILE_BYTES", 30_000)
    write(tmp_path / "in.parquet", prompt=prompts(N), id=list(range(N)))
    return spec(model, tmp_path / "in.parquet", output=tmp_path / "answers")


def run_job(job: JobSpec) -> Report:
    return run(job, STUB)


def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchinfer.jobs.job.MERGE_ROWS", 500)


def test_a_folder_holds_all_rows_in_input_order(job: JobSpec, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_batches(monkeypatch)
    report = run_job(job)
    assert report.rows == N
    files = sorted(job.output.iterdir())
    assert len(files) > 2 and [path.name for path in files[:2]] == ["part-000001.parquet", "part-000002.parquet"]
    table = pq.read_table(job.output)
    assert table["id"].to_pylist() == list(range(N))
    assert table["generated_text"].to_pylist() == expected(model, prompts(N))
    assert f"{N:,} rows" in verify(job.output)[0]
    assert run_job(job) == report, "complete already"


def test_a_flipped_byte_in_any_file_is_found(job: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    small_batches(monkeypatch)
    run_job(job)
    for path in sorted(job.output.iterdir()):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        with pytest.raises(Refused, match="was changed: its sha256"):
            verify(job.output)
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    verify(job.output)
    path.rename(path.with_name("part-000099.parquet"))
    with pytest.raises(Refused, match="was changed: its sha256"):
        verify(job.output)


def test_no_rows_make_a_folder_with_the_columns(tmp_path: Path, model: Path) -> None:
    job = spec(model, write(tmp_path / "in.parquet", prompt=prompts(0)), output=tmp_path / "answers")
    job.output.mkdir()
    run_job(job)
    assert pq.read_table(job.output).column_names[:2] == ["prompt", "generated_text"]


def test_a_folder_is_absent_until_all_rows_are_done(job: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device: .*part-000001"):
        patch.setattr(output_writer.OutputWriter, "write", full)
        run_job(job)
    assert not job.output.exists() and not list((job.output.with_suffix(".run") / "tmp").iterdir())
    run_job(job)
    verify(job.output)


def full(*_: object) -> None:
    raise OSError(28, "the disk is full")


def test_overwrite_replaces_what_a_run_wrote_and_nothing_else(job: JobSpec, tmp_path: Path, model: Path) -> None:
    run_job(job)
    again = spec(model, *job.inputs, output=job.output, seed=1, overwrite=True)
    (job.output / "notes.txt").write_text("mine")
    with pytest.raises(Refused, match=r"holds 'notes.txt', which no run wrote"):
        run_job(again)
    (job.output / "notes.txt").unlink()
    run_job(again)
    verify(job.output)


@pytest.mark.parametrize("name", ["mine.parquet", "part-000001.parquet/deeper", ".hidden"])
def test_a_folder_with_something_in_it_is_refused(job: JobSpec, name: str) -> None:
    path = job.output / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(Refused, match=r"answers (holds|exists)"):
        run_job(job)
    assert path.read_text() == "mine"


def test_a_file_where_the_folder_would_be_is_refused(job: JobSpec) -> None:
    job.output.write_text("mine")
    with pytest.raises(Refused, match="is a file; name one that ends in"):
        run_job(job)


def test_an_input_in_the_output_folder_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "answers").mkdir()
    path = write(tmp_path / "answers" / "in.parquet", prompt=prompts(3))
    with pytest.raises(UsageError, match="is an input too, or contains one"):
        spec(model, path, output=tmp_path / "answers")


def test_rows_that_failed_run_again_into_the_same_folder(job: JobSpec, model: Path) -> None:
    texts = [text if i % 3 else None for i, text in enumerate(prompts(N))]
    write(job.inputs[0], prompt=texts, id=list(range(N)))
    assert run_job(job).rows_failed == N // 3
    report = run_job(spec(model, *job.inputs, output=job.output, retry_errors=True))
    assert report.rows_computed == N // 3
    verify(job.output)


def test_shards_and_their_whole_may_be_folders(job: JobSpec, tmp_path: Path, model: Path) -> None:
    shards = [sharded(job.output, i, 2) for i in range(2)]
    for i, shard in enumerate(shards):
        run_job(spec(model, *job.inputs, output=shard, shard=(i, 2)))
    for whole in (tmp_path / "all", tmp_path / "all.parquet"):
        assert merge_shards(shards, whole, overwrite=False) == N
        assert merge_shards(shards, whole, overwrite=True) == N
        assert pq.read_table(whole)["id"].to_pylist() == list(range(N))
    assert {path.name for path in tmp_path.iterdir() if "answers" not in path.name} == {
        "all",
        "all.parquet",
        "all.run",
        "in.parquet",
    }


def test_an_output_that_is_a_link_is_refused_before_any_work(job: JobSpec, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    job.output.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="is a link or a mount point"):
        run_job(job)


def test_what_a_dead_merge_left_is_in_nobodys_way(job: JobSpec, tmp_path: Path, model: Path) -> None:
    shards = [sharded(job.output, i, 2) for i in range(2)]
    for i, shard in enumerate(shards):
        run_job(spec(model, *job.inputs, output=shard, shard=(i, 2)))
    (tmp_path / ".all.merging").mkdir()
    (tmp_path / ".all.merging" / "part-000001.parquet").touch()
    assert merge_shards(shards, tmp_path / "all", overwrite=False) == N
    assert not list(tmp_path.glob(".all*"))


def test_places_at_the_root_have_run_folders() -> None:
    assert RunFolder(Path("/out.parquet")).path == Path("/out.run")
    assert RunFolder(Path("/out")).path == Path("/out.run")
    assert incremental_files(Path(".")) == [] == incremental_files(Path("/"))
