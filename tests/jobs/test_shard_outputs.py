"""From the names that a user gives to the outputs of all shards."""

from pathlib import Path

import pytest

from batchinfer.errors import Refused
from batchinfer.jobs.launch.slurm import Submission, submitted
from batchinfer.jobs.shard_outputs import outputs_of


def begun(folder: Path, *names: str) -> None:
    for name in names:
        (folder / f"{name}.run").mkdir()


def shards(folder: Path, count: int, name: str = "out", suffix: str = ".parquet") -> list[Path]:
    return [folder / f"{name}-{i}-of-{count}{suffix}" for i in range(count)]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ""])
def test_a_name_stands_for_its_shards_also_for_those_that_have_not_begun(tmp_path: Path, suffix: str) -> None:
    begun(tmp_path, "out-2-of-4", "output-0-of-9", "out-x-of-7")
    assert outputs_of([tmp_path / f"out{suffix}"]) == shards(tmp_path, 4, suffix=suffix)
    begun(tmp_path, "out")
    assert outputs_of([tmp_path / f"out{suffix}"]) == [tmp_path / f"out{suffix}"], "it has a run of its own"


def test_a_shard_alone_is_one_output_and_several_are_their_jobs(tmp_path: Path) -> None:
    begun(tmp_path, "out-0-of-3", "out-2-of-3")
    one, _, two = shards(tmp_path, 3)
    assert outputs_of([one]) == [one]
    assert outputs_of([two, one]) == shards(tmp_path, 3)
    assert outputs_of([one, tmp_path / "other.parquet"]) == [*shards(tmp_path, 3), tmp_path / "other.parquet"]
    assert outputs_of([tmp_path / "none.parquet"]) == [tmp_path / "none.parquet"]


def test_a_pattern_finds_shards_without_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path, "out-1-of-3", "out-0-of-2")
    assert outputs_of([tmp_path / "out-*-of-3.parquet"]) == shards(tmp_path, 3)
    monkeypatch.chdir(tmp_path)
    assert outputs_of([Path("out-*.parquet")]) == [*shards(Path(), 2), *shards(Path(), 3)]
    with pytest.raises(Refused, match=r"no job has begun at no-\*\.parquet"):
        outputs_of([Path("no-*.parquet")])


def test_shards_of_several_jobs_are_told_apart(tmp_path: Path) -> None:
    begun(tmp_path, "out-1-of-3", "out-0-of-12")
    with pytest.raises(
        Refused, match=r"has shards of 3 and of 12; give those of one job, as '.*out-\*-of-12\.parquet'"
    ):
        outputs_of([tmp_path / "out.parquet"])
    assert outputs_of([tmp_path / "out.parquet"], lambda output: 3) == shards(tmp_path, 3)


def test_shards_that_wait_in_the_queue_of_slurm_are_known(tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    assert submitted(output) is None
    submission = Submission(["batchinfer"], ["in.csv"], tmp_path, output, 16)
    submission.scripts_folder.mkdir()
    submission.shards_script.write_text(submission.scripts()[submission.shards_script])
    assert outputs_of([output], submitted) == shards(tmp_path, 16)
    submission.shards_script.write_bytes(b"\xff")
    assert submitted(output) is None
