"""Answers of earlier jobs: the output is that of a job that computes them; none is taken of another job."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import call
from stub_jobs import ENGINES, STUB, counts, limit, prompts, recount, spec, write

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.collector import Results
from batchinfer.jobs.incremental import run_new_rows
from batchinfer.jobs.job import run
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.outlook import plan
from batchinfer.jobs.preflight import preflight
from batchinfer.jobs.results.durable import lock
from batchinfer.jobs.results.schema import KEY, keyless
from batchinfer.jobs.rows.answer_keys import answer_keys
from batchinfer.jobs.rows.windows import Limits
from batchinfer.jobs.spec import JobSpec, sharded
from batchinfer.jobs.verify import verify

N = 300
COLD, WARM = SamplingParams(max_tokens=8), SamplingParams(max_tokens=8, temperature=1.0)
# Answers with letters that follow from the seed.
DRAWS = """
class Draws(Slow):
    SECONDS = 0

    def step(self):
        requests, done = self._waiting[0], super().step()
        letters = [[1 + int(seed) % 50] * (1 + int(seed) % 7) for seed in requests.seeds]
        offsets = np.append(0, np.cumsum([len(answer) for answer in letters]))
        return Completions(done.rows, np.array(sum(letters, []), np.int32), offsets, done.finish_reasons)
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    (tmp_path / "engines_of_the_test.py").write_text(ENGINES + DRAWS)
    monkeypatch.syspath_prepend(tmp_path)
    return "engines_of_the_test:{}".format


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """An output in several parts, of N rows, one of which failed. Only the ids are kept."""
    folder = tmp_path_factory.mktemp("old")
    path = write(folder / "in.parquet", id=list(range(N + 1)), prompt=pa.array([*prompts(N), None]))
    job = spec(model, path, output=folder / "old.parquet", columns=("id",), commit_rows=1)
    with pytest.MonkeyPatch.context() as patch:
        limit(patch, Limits(chunk_rows=40, slice_rows=64))
        run(job, STUB)
    assert len(list((folder / "old.run" / "parts").iterdir())) > 2
    return job.output


def new_table(folder: Path) -> Path:
    """Half of the old prompts in another order, some twice, new ones, and rows that fail."""
    order = np.random.default_rng(1).permutation(N)[: N // 2].tolist()
    texts = [prompts(N)[i] for i in order] + [prompts(N)[order[0]]] * 3 + [f"new {i}" for i in range(20)] + [None, ""]
    shuffled = np.random.default_rng(2).permutation(len(texts)).tolist()
    return write(folder / "in.parquet", prompt=pa.array([texts[i] for i in shuffled]), id=list(range(len(texts))))


@pytest.mark.parametrize("window_rows", [1 << 20, 30])
def test_the_output_is_that_of_a_job_that_computes_all(
    tmp_path: Path, model: Path, old: Path, window_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, Limits(window_rows=window_rows, slice_rows=16))
    path = new_table(tmp_path)
    computed = run(spec(model, path, output=tmp_path / "computed.parquet"), STUB)
    report = run(spec(model, path, reuse=(old,), commit_rows=50), STUB)
    assert pq.read_table(tmp_path / "out.parquet").equals(pq.read_table(tmp_path / "computed.parquet"))
    assert (report.rows, report.rows_reused, report.rows_computed) == (N // 2 + 25, N // 2 + 3, 22)
    assert counts(report) == recount(tmp_path / "out.parquet") == counts(computed)
    assert report.prompt_tokens_computed < computed.prompt_tokens_computed / 4
    assert "reused" in report.table()
    verify(tmp_path / "out.parquet")


def test_where_all_answers_are_known_no_model_is_loaded_and_the_output_can_be_reused_again(
    tmp_path: Path, model: Path, old: Path, engine: Callable[[str], str]
) -> None:
    path = write(tmp_path / "in.parquet", prompt=pa.array([*prompts(N), None]))
    first = spec(model, path, reuse=(old,))
    report = run(first, engine("refuse"))
    assert (report.rows_reused, report.rows_computed) == (N, 1)
    assert "no row was left to compute, so no model was loaded" in report.notes
    again = run(spec(model, path, output=tmp_path / "again.parquet", reuse=(first.output, old)), engine("refuse"))
    assert again.rows_reused == N
    assert pq.read_table(first.output).equals(pq.read_table(tmp_path / "again.parquet"))


def test_a_plan_counts_the_rows_with_answers(tmp_path: Path, model: Path, old: Path) -> None:
    found = plan(spec(model, new_table(tmp_path), reuse=(old,), device="cpu"))
    assert (found.rows, found.rows_reused, found.rows_to_run) == (N // 2 + 25, N // 2 + 3, 20)
    assert f"{N // 2 + 3} rows with answers in earlier outputs" in found.text(None)


@pytest.mark.parametrize("n", [1, 3])
def test_drawn_answers_are_reused_for_the_same_seed_alone(
    tmp_path: Path, model: Path, engine: Callable[[str], str], n: int
) -> None:
    """A seed comes from --seed and the row's id. A third of the rows has another id now."""
    before = write(tmp_path / "before.parquet", id=[f"#{i}" for i in range(30)], prompt=prompts(30))
    after = write(tmp_path / "in.parquet", id=[f"#{i}" if i % 3 else f"new {i}" for i in range(30)], prompt=prompts(30))
    fields: dict[str, Any] = {"id_column": "id", "sampling": WARM, "n": n}
    run(spec(model, before, output=tmp_path / "old.parquet", **fields), engine("Draws"))
    report = run(spec(model, after, reuse=(tmp_path / "old.parquet",), **fields), engine("Draws"))
    assert (report.rows_reused, report.rows_computed) == (20, 10)
    run(spec(model, after, output=tmp_path / "computed.parquet", **fields), engine("Draws"))
    assert pq.read_table(tmp_path / "out.parquet").equals(pq.read_table(tmp_path / "computed.parquet"))
    another = spec(model, after, output=tmp_path / "x.parquet", reuse=(tmp_path / "old.parquet",), seed=1, **fields)
    with pytest.raises(Refused, match=r"old\.parquet was computed with another sampling"):
        run(another, STUB)


def test_rows_that_failed_are_computed(tmp_path: Path, model: Path, engine: Callable[[str], str]) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(10))
    run(spec(model, path, output=tmp_path / "old.parquet"), engine("Fails"))
    report = run(spec(model, path, reuse=(tmp_path / "old.parquet",)), STUB)
    assert (report.rows_reused, report.rows_computed, report.rows_failed) == (5, 5, 0)


@pytest.mark.parametrize(("n", "sampling"), [(1, COLD), (3, WARM)])
def test_each_row_has_the_key_of_its_own_prompt_duplicates_too(
    tmp_path: Path, model: Path, engine: Callable[[str], str], n: int, sampling: SamplingParams
) -> None:
    texts = np.random.default_rng(0).permutation(prompts(40) * 3).tolist()
    job = spec(model, write(tmp_path / "in.parquet", prompt=[*texts, None]), n=n, sampling=sampling)
    run(job, engine("Slow"))
    parts = [pq.read_table(part) for part in (tmp_path / "out.run" / "parts").iterdir()]
    keys = {row["row"]: row["key"] for part in parts for row in part.to_pylist()}
    checked = preflight(job)
    ((first, batch),) = checked.table.batches(["prompt"], 1000)
    requests, _ = checked.source.tokenize(first, batch)
    expected = dict(
        zip(requests.rows.tolist(), (bytes(key).ljust(16, b"\0") for key in answer_keys(requests)), strict=True)
    )
    assert keys.pop(120) is None
    assert keys == expected and len({*keys.values()}) == 40


def test_growing_outputs_shards_and_json_lines_give_answers(tmp_path: Path, model: Path) -> None:
    def table(first: int, end: int) -> Path:
        texts = prompts(60)[first:end]
        return write(tmp_path / "in.parquet", id=list(range(first, end)), prompt=texts)

    grown = tmp_path / "grown"
    for end in (10, 20):
        job = spec(model, table(0, end), output=grown, id_column="id", incremental=True)
        run_new_rows(job, lambda each: run(each, STUB))
    shards = [sharded(tmp_path / "s.parquet", i, 2) for i in range(2)]
    for i, shard in enumerate(shards):
        run(spec(model, table(20, 40), output=shard, shard=(i, 2)), STUB)
    run(spec(model, table(40, 50), output=tmp_path / "lines.jsonl"), STUB)
    merge_shards(shards, tmp_path / "s.parquet", overwrite=False)
    outputs = (grown, *shards, tmp_path / "lines.jsonl")
    report = run(spec(model, table(0, 60), output=tmp_path / "out.parquet", reuse=outputs), STUB)
    assert (report.rows_reused, report.rows_computed) == (50, 10)
    with pytest.raises(Refused, match=r"there is no .*s\.run/run\.json; .* of merged shards, give the shards"):
        run(spec(model, table(0, 60), output=tmp_path / "x.parquet", reuse=(tmp_path / "s.parquet",)), STUB)


def test_a_job_that_stopped_takes_the_answers_that_are_left(tmp_path: Path, model: Path, old: Path) -> None:
    job = spec(model, new_table(tmp_path), reuse=(old,), commit_rows=20)
    run(job, STUB)
    (tmp_path / "out.parquet").unlink()
    lost = max((tmp_path / "out.run" / "parts").iterdir())
    rows = pq.read_metadata(lost).num_rows
    lost.unlink()
    report = run(job, STUB)
    assert report.rows_reused + report.rows_computed == rows == report.rows - report.rows_resumed
    assert verify(tmp_path / "out.parquet")


def changed(folder: Path, model: Path) -> dict[str, dict[str, Any]]:
    """What makes another job, by what is said of it."""
    heavier, shorter = folder / "heavier", folder / "shorter"
    for made in (heavier, shorter):
        shutil.copytree(model, made)
    (heavier / "model.safetensors").write_bytes(bytes(100))
    config = json.loads((shorter / "config.json").read_text())
    (shorter / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    return {
        "another model,": {"model": heavier},
        "model,": {"model": shorter},
        "quantization,": {"quantization": "w8a8-int8"},
        r"another quantization, or number of rows \(at most 4, or more\), so its answers": {"dtype": "float32"},
        "another sampling, so its answers": {"sampling": SamplingParams(max_tokens=9)},
        "version, device or --deterministic": {"deterministic": True},
    }


def test_outputs_of_other_jobs_are_refused_by_what_differs(tmp_path: Path, model: Path, old: Path) -> None:
    path = new_table(tmp_path)
    for said, fields in changed(tmp_path, model).items():
        job = spec(fields.pop("model", model), path, reuse=(old,), **fields)
        with pytest.raises(Refused, match=f"{old} was computed with .*{said}"):
            run(job, STUB)
        assert not (tmp_path / "out.run").exists()


def test_a_part_of_another_version_is_refused(tmp_path: Path, model: Path, old: Path) -> None:
    """A run may have gone on with another version; its parts say which wrote them."""
    copied = copy_of(old, tmp_path)
    part = tmp_path / "old.run" / "parts" / "part-000002.parquet"
    table = pq.read_table(part)
    written = json.loads(table.schema.metadata[b"batchinfer"]) | {"engine": "another"}
    pq.write_table(table.replace_schema_metadata({"batchinfer": json.dumps(written)}), part)
    with pytest.raises(Refused, match=r"part-000002.parquet was computed with another version, device"):
        run(spec(model, new_table(tmp_path), reuse=(copied,)), STUB)


def test_parts_without_keys_are_refused_here_and_go_on_as_their_own_job(tmp_path: Path, model: Path, old: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(20))
    job = spec(model, path, output=tmp_path / "before.parquet", commit_rows=5)
    run(job, STUB)
    whole = pq.read_table(job.output)
    for part in (tmp_path / "before.run" / "parts").iterdir():
        table = pq.read_table(part)
        pq.write_table(table.drop([KEY.name]).cast(keyless(table.schema)), part)
    with pytest.raises(Refused, match=r"part-000001.parquet has no answer keys, since an earlier version"):
        run(spec(model, path, reuse=(job.output,)), STUB)
    job.output.unlink()
    assert run(job, STUB).rows_resumed == 20
    assert pq.read_table(job.output).equals(whole)


def copy_of(output: Path, folder: Path) -> Path:
    shutil.copy(output, folder)
    shutil.copytree(output.with_suffix(".run"), folder / f"{output.stem}.run")
    return folder / output.name


def damage_run(folder: Path) -> None:
    (folder / "old.run" / "run.json").write_text("{")


def damage_part(folder: Path) -> None:
    (folder / "old.run" / "parts" / "part-000001.parquet").write_bytes(b"PAR1")


def unlink_output(folder: Path) -> None:
    (folder / "old.parquet").unlink()


def unlink_folder(folder: Path) -> None:
    shutil.rmtree(folder / "old.run")


def work_on_it(folder: Path) -> None:
    assert lock(folder / "old.run" / "lock") is not None


@pytest.mark.parametrize(
    ("spoil", "code", "said"),
    [
        (damage_run, 65, "old.run is damaged; leave this output out"),
        (damage_part, 74, "part-000001.parquet is damaged"),
        (unlink_output, 65, "there is no such output, or it is not complete"),
        (unlink_folder, 65, "old.run/run.json; give the output of a complete run, with its run folder beside it"),
        (work_on_it, 65, "a run is at work on it; try again when that has ended"),
    ],
)
def test_what_gives_no_answers_is_refused_in_one_line(
    tmp_path: Path, model: Path, old: Path, capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None], code: int, said: str,
) -> None:  # fmt: skip
    path, copied = new_table(tmp_path), copy_of(old, tmp_path)
    spoil(tmp_path)
    arguments = ["run", path, "-o", tmp_path / "out.parquet", "--model", model, "--max-tokens", "8", "--reuse", copied]
    found, line = call(capsys, *arguments)
    assert (found, said in line) == (code, True), line
    assert not (tmp_path / "out.run").exists()


def test_an_output_that_may_only_be_read_gives_answers(
    tmp_path: Path, model: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = os.open

    def denied(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_RDWR and str(old.parent) in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_file(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", denied)
    assert plan(spec(model, new_table(tmp_path), reuse=(old,), device="cpu")).rows_reused == N // 2 + 3


def test_the_output_itself_is_refused(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(3))
    with pytest.raises(UsageError, match="is the --output itself"):
        spec(model, path, reuse=(tmp_path / "out.parquet",))


def test_many_rows_with_one_answer_are_taken_in_bounded_batches(
    tmp_path: Path, model: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr("batchinfer.jobs.rows.reuse.TAKEN_ROWS", 100)
    take_over = Results.take_over

    def counted(self: Results, batch: pa.RecordBatch) -> None:
        sizes.append(len(batch))
        take_over(self, batch)

    monkeypatch.setattr(Results, "take_over", counted)
    job: JobSpec = spec(model, write(tmp_path / "in.parquet", prompt=prompts(1) * 350), reuse=(old,))
    assert run(job, STUB).rows_reused == 350
    assert sizes == [100, 100, 100, 50]
