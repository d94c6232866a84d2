"""Jobs with rows that must come out alike: computed once, and every row of the input just once in the output."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stub_jobs
from measured_devices import SHAPE
from stub_jobs import ENGINES, STUB, counts, expected, limit, prompts, recount, spec, write

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused
from batchinfer.jobs.job import run
from batchinfer.jobs.outlook import plan
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.rows.windows import Limits
from batchinfer.jobs.verify import verify

RECORDS = """
class Records(StubEngine):
    def add(self, requests):
        with open("computed", "a") as file:
            file.write("".join(f"{row}\\n" for row in requests.rows))
        super().add(requests)

class SlowlyRecords(Records, Slow):
    pass
"""
N = 400
TEXTS = [f"prompt {i % 150} " + "x" * (i % 5) for i in range(N)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stub_jobs.make_model(tmp_path_factory.mktemp("model"), **SHAPE)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The name of an engine that computes nothing; `Records` keeps a list of its rows, in `computed`."""
    recording = RECORDS.replace('"computed"', repr(str(tmp_path / "computed")))
    (tmp_path / "engines_of_the_test.py").write_text(ENGINES + recording)
    monkeypatch.syspath_prepend(tmp_path)
    return "engines_of_the_test:{}".format


def computed(folder: Path) -> list[int]:
    return sorted(map(int, (folder / "computed").read_text().split()))


def leaders_of(texts: list[str]) -> list[int]:
    first: dict[str, int] = {}
    return sorted({first.setdefault(text, row) for row, text in enumerate(texts)})


@pytest.mark.parametrize("limits", [Limits(), Limits(slice_rows=64, chunk_rows=30), Limits(chunk_tokens=500)])
def test_each_prompt_is_computed_once(
    tmp_path: Path, model: Path, engine: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, limits: Limits
) -> None:
    limit(monkeypatch, limits)
    path = write(tmp_path / "in.parquet", prompt=TEXTS)
    report = run(spec(model, path, commit_rows=50), engine("Records"))
    assert computed(tmp_path) == leaders_of(TEXTS)
    assert (report.rows, report.rows_computed, report.rows_duplicate) == (N, N, N - len(leaders_of(TEXTS)))
    assert report.rows_duplicate > 200
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["generated_text"].to_pylist() == expected(model, TEXTS)
    assert table["prompt_tokens"].to_pylist() == [len(text) for text in TEXTS]
    assert counts(report) == recount(tmp_path / "out.parquet")
    assert sum(report.buckets.values()) == N
    verify(tmp_path / "out.parquet")
    assert not list((tmp_path / "out.run" / "tmp").iterdir())


def test_each_window_has_leaders_of_its_own(
    tmp_path: Path, model: Path, engine: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, Limits(slice_rows=40, window_rows=200, chunk_rows=64))
    path = write(tmp_path / "in.parquet", prompt=TEXTS)
    report = run(spec(model, path), engine("Records"))
    second = [200 + row for row in leaders_of(TEXTS[200:])]
    assert computed(tmp_path) == leaders_of(TEXTS[:200]) + second
    assert report.rows_duplicate == N - len(computed(tmp_path))
    assert pq.read_table(tmp_path / "out.parquet")["generated_text"].to_pylist() == expected(model, TEXTS)


def test_rows_that_draw_other_tokens_are_no_duplicates(
    tmp_path: Path, model: Path, engine: Callable[[str], str]
) -> None:
    """With an id column the seed is the row's own; without one it comes from the prompt."""
    path = write(tmp_path / "in.parquet", prompt=["a", "b", "a"], id=[1, 2, 3])
    drawn = SamplingParams(max_tokens=4, temperature=1.0)
    for fields, duplicates in (
        ({"sampling": drawn, "id_column": "id"}, 0),
        ({"sampling": drawn}, 1),
        ({"id_column": "id"}, 1),
        ({"deduplicate": False}, 0),
    ):
        report = run(spec(model, path, overwrite=True, **fields), STUB)
        assert (report.rows_duplicate, report.rows_computed) == (duplicates, 3)
        assert pq.read_table(tmp_path / "out.parquet")["generated_text"].to_pylist() == ["a", "b", "a"]


def test_an_error_of_the_leader_is_the_followers_too_and_runs_again_with_them(
    tmp_path: Path, model: Path, engine: Callable[[str], str]
) -> None:
    texts = ["a", "b", "b", "c", "a", "b", ""]
    path = write(tmp_path / "in.parquet", prompt=texts)
    report = run(spec(model, path), engine("Fails"))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["error_code"].to_pylist() == [None, *["not_finite"] * 3, None, "not_finite", "empty_prompt"]
    assert {table["error_message"][row].as_py() for row in (1, 2, 5)} == {"row 1"}
    assert (report.rows_duplicate, report.rows_by_error) == (3, {"not_finite": 4, "empty_prompt": 1})
    assert counts(report) == recount(tmp_path / "out.parquet")
    with pytest.raises(Refused, match="5 of 7 rows failed"):
        run(spec(model, path, overwrite=True, max_error_rate=0.6), engine("Fails"))
    run(spec(model, path, overwrite=True), engine("Fails"))
    again = run(spec(model, path, retry_errors=True), engine("Records"))
    assert computed(tmp_path) == [1, 3]
    assert (again.rows_resumed, again.rows_computed, again.rows_duplicate) == (2, 5, 2)
    assert counts(again) == recount(tmp_path / "out.parquet") and again.rows_by_error == {"empty_prompt": 1}


def test_rows_that_kill_the_engine_take_their_followers_with_them(
    tmp_path: Path, model: Path, engine: Callable[[str], str]
) -> None:
    texts = prompts(40)
    texts += [texts[30], texts[13], texts[7]]
    path = write(tmp_path / "in.parquet", prompt=texts)
    report = run(spec(model, path), engine("Poisoned"))
    table = pq.read_table(tmp_path / "out.parquet")
    wrong = [row for row, code in enumerate(table["error_code"].to_pylist()) if code == "engine_died"]
    assert wrong == [13, 30, 40, 41] and report.rows_by_error == {"engine_died": 4}
    assert table["error_message"][30] == table["error_message"][40]
    assert report.rows_duplicate == 3
    assert table["generated_text"][42].as_py() == expected(model, texts)[42]
    assert counts(report) == recount(tmp_path / "out.parquet")


def test_a_job_that_was_stopped_has_answered_leaders_and_followers_together(
    tmp_path: Path, model: Path, engine: Callable[[str], str]
) -> None:
    path = write(tmp_path / "in.parquet", prompt=TEXTS)
    commit = RunFolder.commit

    def stop_at_the_third(self: RunFolder, finished: list[pa.RecordBatch]) -> None:
        if len(list(self.parts.iterdir())) == 2:
            raise KeyboardInterrupt
        commit(self, finished)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "commit", stop_at_the_third)
        run(spec(model, path, commit_rows=20), engine("SlowlyRecords"))
    parts = list((tmp_path / "out.run" / "parts").iterdir())
    done = [row for part in parts for row in pq.read_table(part)["row"].to_pylist()]
    assert 0 < len(done) < N and {TEXTS[row] for row in done}.isdisjoint(
        TEXTS[row] for row in set(range(N)) - set(done)
    )
    assert not list((tmp_path / "out.run" / "tmp").iterdir())
    (tmp_path / "computed").unlink()
    report = run(spec(model, path), engine("Records"))
    assert computed(tmp_path) == sorted(set(leaders_of(TEXTS)) - set(done))
    assert (report.rows_resumed, report.rows_computed) == (len(done), N - len(done))
    assert report.rows_duplicate == N - len(done) - len(computed(tmp_path))
    assert pq.read_table(tmp_path / "out.parquet")["generated_text"].to_pylist() == expected(model, TEXTS)


def test_a_real_engine_gives_what_it_gives_without_duplicates(
    tmp_path: Path, model: Path, make_model: Callable[..., Path]
) -> None:
    """Killed before its merge with a part lost, and resumed."""
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama"), folder)
    shutil.copy(model / "tokenizer.json", folder)
    texts = ["def count(words): " * 8 + f"# {i % 6}" for i in range(16)]
    path = write(tmp_path / "in.parquet", prompt=texts)
    fields = {"commit_rows": 1, "max_num_seqs": 2, "max_num_batched_tokens": 64, "prefix_sharing": False}
    plain = run(spec(folder, path, output=tmp_path / "plain.parquet", deduplicate=False, **fields))
    truth = pq.read_table(tmp_path / "plain.parquet")
    assert (plain.rows_duplicate, plain.rows_failed) == (0, 0)

    def killed(self: RunFolder, aside: Path) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "publish", killed)
        run(spec(folder, path, **fields))
    parts = sorted((tmp_path / "out.run" / "parts").iterdir())
    lost = set(pq.read_table(parts[-1])["row"].to_pylist())
    parts[-1].unlink()
    resumed = run(spec(folder, path, **fields))
    assert pq.read_table(tmp_path / "out.parquet").equals(truth)
    assert 0 < resumed.rows_resumed == 16 - len(lost) and resumed.rows_computed == len(lost)
    assert resumed.rows_duplicate == len(lost) - len({texts[row] for row in lost}) > 0
    assert resumed.prompt_tokens == plain.prompt_tokens == plain.prompt_tokens_computed
    lengths = dict(zip(texts, truth["prompt_tokens"].to_pylist(), strict=True))
    assert resumed.prompt_tokens_computed == sum(lengths[text] for text in {texts[row] for row in lost})


def test_one_row_has_many_followers_and_memory_only_some_at_a_time(
    tmp_path: Path, model: Path, engine: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchinfer.jobs.feed.FOLLOWERS", 64)
    path = write(tmp_path / "in.parquet", prompt=["the same"] * 1000)
    report = run(spec(model, path, commit_rows=100), engine("Records"))
    assert computed(tmp_path) == [0] and report.rows_duplicate == 999
    assert len(list((tmp_path / "out.run" / "parts").iterdir())) >= 7, "followers are committed as they come"
    assert pq.read_table(tmp_path / "out.parquet")["generated_text"].to_pylist() == expected(model, ["the same"]) * 1000
    verify(tmp_path / "out.parquet")


SAMPLED = SamplingParams(max_tokens=8, temperature=0.7)
WORDS = "rows have the prompt of an earlier row and so its answer, also at temperature 0.7"


def told(notes: list[str]) -> list[str]:
    return [note for note in notes if "of an earlier row" in note]


@pytest.mark.parametrize("n", [1, 3])
def test_rows_that_draw_the_same_text_are_told_in_log_report_and_plan(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], n: int
) -> None:
    path = write(tmp_path / "in.parquet", prompt=TEXTS)
    job = spec(model, path, sampling=SAMPLED, n=n)
    (planned,) = told(plan(job).notes)
    report = run(job, STUB)
    again = N - len(set(TEXTS))
    assert planned.startswith(f"{again} {WORDS}") and "--id-column" in planned and "--n " in planned
    assert told(report.notes) == [planned] and planned in report.table()
    lines = capsys.readouterr().err.splitlines()
    assert [planned in line for line in lines if "of an earlier row" in line] == [True]


@pytest.mark.parametrize(
    ("texts", "fields"),
    [
        (TEXTS, {"sampling": SamplingParams(max_tokens=8)}),  # one answer is the only one
        (TEXTS, {"sampling": SAMPLED, "id_column": "id"}),  # each draws its own
        (prompts(N), {"sampling": SAMPLED}),
    ],
)
def test_rows_that_draw_their_own_or_have_one_answer_are_not_told(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], texts: list[str], fields: dict[str, Any]
) -> None:
    path = write(tmp_path / "in.parquet", prompt=texts, id=range(N))
    job = spec(model, path, **fields)
    assert told(plan(job).notes) == told(run(job, STUB).notes) == told(capsys.readouterr().err.splitlines()) == []


def test_one_row_is_told_as_one(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=["a", "b", "a"])
    (note,) = told(run(spec(model, path, sampling=SAMPLED), STUB).notes)
    assert note.startswith("1 row has the prompt of an earlier row and so its answer")
