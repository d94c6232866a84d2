"""Several samples of a row: what is in the output, and that a row is whole or not there."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from engines import engine_of, tokens
from repository import TARGET
from stub_jobs import ENGINES, SCRIPT, STUB, expected, limit, prompts, spec, write

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.request import Completions, Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused, UsageError
from batchinfer.jobs import incremental, job
from batchinfer.jobs.cli.run import job_of
from batchinfer.jobs.job import run
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.process.samples import SampledEngine, sampled
from batchinfer.jobs.process.stub_engine import StubEngine
from batchinfer.jobs.report import Report, read_report
from batchinfer.jobs.results.schema import RESULT_FIELDS
from batchinfer.jobs.rows.windows import Limits
from batchinfer.jobs.sampling_flags import MAX_SAMPLES
from batchinfer.jobs.spec import JobSpec, sharded
from batchinfer.jobs.verify import verify
from batchinfer.text.tokenizer import Tokenizer

WARM = SamplingParams(max_tokens=8, temperature=1.0)

# `Draws` answers with letters that follow from the seed, so many that they follow from it too.
DRAWS = """
import threading

class Draws(Slow):
    def step(self):
        requests, done = self._waiting[0], super().step()
        letters = [[1 + int(seed) % 50] * (1 + int(seed) % 7) for seed in requests.seeds]
        offsets = np.append(0, np.cumsum([len(answer) for answer in letters]))
        return Completions(done.rows, np.array(sum(letters, []), np.int32), offsets, done.finish_reasons)

class DrawsLastFirst(Draws):
    SECONDS = 0

    def step(self):
        self._waiting.rotate(1)
        return super().step()

class Fails4(DrawsLastFirst):
    # The second and the fourth sample of row 1, and the first of row 3; a row has 128 numbers.
    def step(self):
        done = super().step()
        errors = {int(i): RowError("not_finite", f"sample {i}") for i in done.rows if i in (129, 131, 384)}
        done.finish_reasons[np.isin(done.rows, list(errors))] = FinishReason.ERROR
        return Completions(done.rows, done.token_ids, done.offsets, done.finish_reasons, errors)

class Poisoned4(Draws):
    # Row 3 with its second sample, row 7 with each.
    def step(self):
        if {385, 896, 897, 898, 899} & set(self._waiting[0].rows.tolist()):
            os.kill(os.getpid(), signal.SIGBUS)
        return super().step()

class Poisoned16(Draws):
    # Each sample of row 2.
    def step(self):
        if 2 in (self._waiting[0].rows // 128).tolist():
            os.kill(os.getpid(), signal.SIGBUS)
        return super().step()
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The name of an engine of `ENGINES` or `DRAWS`."""
    (tmp_path / "engines_of_the_test.py").write_text(ENGINES + DRAWS)
    monkeypatch.syspath_prepend(tmp_path)
    return "engines_of_the_test:{}".format


def table_of(output: Path) -> pa.Table:
    return pq.read_table(output, page_checksum_verification=True)


def tokens_of(table: pa.Table) -> int:
    """The completion tokens of a table, as a user would count them."""
    rows = table.select(["completion_tokens", "samples"]).to_pylist()
    answers = [row["samples"] or [row] for row in rows]
    return sum(answer["completion_tokens"] or 0 for samples in answers for answer in samples)


def check(output: Path, n: int) -> pa.Table:
    """The output, whose samples agree with its other columns, its report and its parts."""
    table = table_of(output)
    for row in table.to_pylist():
        if row["error_code"] is None:
            assert len(row["samples"]) == n
            assert row["samples"][0] == {name: row[name] for name in row["samples"][0]}
        else:
            assert (row["samples"], row["generated_text"], row["finish_reason"]) == (None, None, "error")
    report = read_report(output)
    assert (report.rows, report.completion_tokens) == (len(table), tokens_of(table))
    assert f"{tokens_of(table):,} completion tokens" in verify(output)[0]
    return table


def samples_in(table: pa.Table) -> list[list[str]]:
    return [[sample["generated_text"] for sample in row] for row in table["samples"].to_pylist()]


def wanting(requests: Requests, *samples: int) -> Requests:
    """Requests for so many samples of each row."""
    return replace(requests, samples=np.resize(np.array(samples, np.int32), len(requests)))


def test_samples_are_rows_of_the_engine_in_order_and_the_first_keeps_the_seed() -> None:
    requests = Requests.of([[5, 6], [7]], WARM, seeds=[11, 2**64 - 1])
    found = sampled(wanting(requests, 3))
    assert found.rows.tolist() == [0, 1, 2, MAX_SAMPLES, MAX_SAMPLES + 1, MAX_SAMPLES + 2]
    assert [found.token_ids[a:b].tolist() for a, b in zip(found.offsets, found.offsets[1:], strict=False)] == [
        [5, 6], [5, 6], [5, 6], [7], [7], [7]
    ]  # fmt: skip
    assert found.seeds.dtype == np.uint64 and len(set(found.seeds.tolist())) == 6
    assert found.seeds[::3].tolist() == [11, 2**64 - 1]
    assert sampled(wanting(requests, 2)).seeds.tolist() == found.seeds[[0, 1, 3, 4]].tolist(), (
        "more samples change none"
    )


class OneByOne(StubEngine):
    """Ends one sample a step, the last one first, and begins it in the same step."""

    def add(self, requests: Requests) -> None:
        for i in reversed(range(len(requests))):
            super().add(requests.take(np.array([i])))

    def step(self) -> Completions:
        self._admitted = self._waiting[0].rows.tolist()
        return super().step()

    def take_admitted(self) -> list[int]:
        return self._admitted


def test_a_row_begins_with_a_sample_and_ends_with_the_last(model: Path) -> None:
    engine = SampledEngine(OneByOne(EngineConfig(model), Tokenizer.load(model)))
    engine.add(wanting(Requests.of([[5, 6], [7]], WARM), 3))
    steps = [(engine.unfinished, engine.step(), engine.take_admitted()) for _ in range(6)]
    assert [unfinished for unfinished, _, _ in steps] == [6, 5, 4, 3, 2, 1]
    assert [admitted for _, _, admitted in steps] == [[1], [1], [1], [0], [0], [0]]
    assert [done.rows.tolist() for _, done, _ in steps] == [[], [], [1, 1, 1], [], [], [0, 0, 0]]
    assert steps[-1][1].token_ids.tolist() == [5, 6] * 3 and steps[-1][1].offsets.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("window_rows", [10, 100_000])
def test_the_output_has_the_rows_as_without_and_their_samples(
    tmp_path: Path, model: Path, engine: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, window_rows: int
) -> None:
    limit(monkeypatch, Limits(slice_rows=8, window_rows=window_rows))
    texts = [*prompts(40), None, ""]
    path = write(tmp_path / "in.parquet", prompt=texts, id=list(range(42)))
    report = run(spec(model, path, sampling=WARM, n=5), engine("DrawsLastFirst"))
    table = check(tmp_path / "out.parquet", 5)
    sample = pa.struct(
        [("generated_text", pa.string()), ("finish_reason", pa.string()), ("completion_tokens", pa.int32())]
    )
    assert table.schema.equals(
        pa.schema([("prompt", pa.string()), ("id", pa.int64()), *RESULT_FIELDS, ("samples", pa.list_(sample))])
    )
    run(spec(model, path, sampling=WARM, output=tmp_path / "one.parquet"), engine("Draws"))
    assert table.drop_columns("samples").equals(table_of(tmp_path / "one.parquet"))
    assert len({tuple(samples) for samples in samples_in(table.slice(0, 40))}) == 40
    assert all(len(set(samples)) > 1 for samples in samples_in(table.slice(0, 40)))
    assert (report.rows, report.rows_failed, report.rows_by_error) == (42, 2, {"null_prompt": 1, "empty_prompt": 1})
    assert report.prompt_tokens == sum(table["prompt_tokens"].drop_null().to_pylist())
    assert report.notes == ["every row has 5 samples (--n), and completion tokens are counted over all of them"]


def test_greedy_samples_are_the_same_and_one_is_computed(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=[*prompts(20), None])
    report = run(spec(model, path, n=3), STUB)
    table = check(tmp_path / "out.parquet", 3)
    assert samples_in(table.slice(0, 20)) == [[text] * 3 for text in expected(model, prompts(20))]
    assert report.completion_tokens == 3 * 20 * 8 and report.prompt_tokens_computed == report.prompt_tokens
    assert "at temperature 0 they are all the same, so only one is computed" in report.notes[0]


def test_a_row_of_which_a_sample_failed_has_the_error_of_the_first_such(
    tmp_path: Path, model: Path, engine: Callable[[str], str]
) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(6))
    report = run(spec(model, path, sampling=WARM, n=4), engine("Fails4"))
    table = check(tmp_path / "out.parquet", 4)
    assert table["error_message"].to_pylist() == [None, "sample 129", None, "sample 384", None, None]
    assert (report.rows_ok, report.rows_failed, report.rows_by_error) == (4, 2, {"not_finite": 2})
    with pytest.raises(Refused, match=r"2 of 6 rows failed \(not_finite 2\), more than --max-error-rate 0.3"):
        run(spec(model, path, sampling=WARM, n=4, overwrite=True, max_error_rate=0.3), engine("Fails4"))


def test_rows_that_failed_run_again_with_all_their_samples(
    tmp_path: Path, model: Path, engine: Callable[[str], str]
) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(6))
    run(spec(model, path, sampling=WARM, n=4), engine("Fails4"))
    report = run(spec(model, path, sampling=WARM, n=4, retry_errors=True), engine("Draws"))
    assert (report.rows_resumed, report.rows_failed) == (4, 0)
    table = check(tmp_path / "out.parquet", 4)
    run(spec(model, path, sampling=WARM, n=4, output=tmp_path / "undisturbed.parquet"), engine("Draws"))
    assert table.equals(table_of(tmp_path / "undisturbed.parquet"))


@pytest.mark.parametrize(("name", "n", "dead"), [("Poisoned4", 4, [3, 7]), ("Poisoned16", 16, [2])])
def test_a_row_with_samples_that_kill_the_engine_is_given_up_and_no_other(
    tmp_path: Path, model: Path, engine: Callable[[str], str], name: str, n: int, dead: list[int]
) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(9))
    report = run(spec(model, path, sampling=WARM, n=n), engine(name))
    table = check(tmp_path / "out.parquet", n)
    assert [i for i, code in enumerate(table["error_code"].to_pylist()) if code == "engine_died"] == dead
    assert (report.rows_ok, report.rows_by_error) == (9 - len(dead), {"engine_died": len(dead)})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_row_is_committed_whole_and_the_same_command_goes_on(
    tmp_path: Path, model: Path, engine: Callable[[str], str], number: signal.Signals
) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(150))
    (tmp_path / "main.py").write_text(textwrap.dedent(SCRIPT).replace(":Slow", ":Draws"))
    flags = ["--model", model, "--commit-rows", "20", "--max-tokens", "8", "--temperature", "1", "--n", "3"]
    command = [sys.executable, tmp_path / "main.py", tmp_path, "run", path, "-o", tmp_path / "out.parquet", *flags]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    parts = tmp_path / "out.run" / "parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=60) == (75 if number == signal.SIGTERM else -number)
    committed = [row for part in parts.glob("*") for row in pq.read_table(part).to_pylist()]
    assert 0 < len(committed) < 150 and all(len(row["samples"]) == 3 for row in committed)
    job = spec(model, path, commit_rows=20, sampling=WARM, n=3)
    assert run(job, engine("Draws")).rows_resumed == len(committed)
    table = check(tmp_path / "out.parquet", 3)
    run(spec(model, path, sampling=WARM, n=3, output=tmp_path / "undisturbed.parquet"), engine("DrawsLastFirst"))
    assert table.equals(table_of(tmp_path / "undisturbed.parquet"))


@pytest.mark.parametrize(
    ("limits", "steps"),
    [(Limits(slice_rows=8, chunk_rows=120), [1, 1, 5]), (Limits(slice_rows=8, chunk_tokens=900), [1, 2, 7])],
)
def test_samples_count_for_what_the_engine_is_sent_at_once(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, limits: Limits, steps: list[int]
) -> None:
    """The engine ends in one step what came together."""
    limit(monkeypatch, limits)
    path = write(tmp_path / "in.parquet", prompt=[f"{i:010}" for i in range(40)])
    assert [run(spec(model, path, sampling=WARM, n=n, overwrite=True), STUB).steps for n in (1, 3, 15)] == steps


def test_the_engine_is_made_for_all_samples(tmp_path: Path, model: Path, engine: Callable[[str], str]) -> None:
    path = write(tmp_path / "in.parquet", prompt=[f"{i:010}" for i in range(10)])
    job = spec(model, path, sampling=WARM, n=3, overwrite=True, block_size=16)
    notes = [run(replace(job, **fields), engine("Remembers")).notes[0] for fields in ({}, {"max_num_seqs": 5})]
    assert notes == [f"{rows * 32} tokens of KV" for rows in (30, 5)], "two blocks for each that may run"
    resolved = json.loads((tmp_path / "out.run" / "run.json").read_text())
    assert run(job, engine("Remembers")).rows == 10 and resolved["engine"]["expected_batch"] == 5
    assert json.loads((tmp_path / "out.run" / "run.json").read_text())["engine"]["expected_batch"] == 30


def test_samples_count_for_a_commit(tmp_path: Path, model: Path, engine: Callable[[str], str]) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(40))
    run(spec(model, path, sampling=WARM, n=4, commit_rows=20), engine("Slow"))
    parts = json.loads((tmp_path / "out.run" / "manifest.json").read_text())["parts"]
    assert len(parts) > 4 and sum(part["rows"] for part in parts) == 40


def test_another_number_of_samples_is_another_job(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(4))
    run(spec(model, path, n=2), STUB)
    for n in (1, 3):
        with pytest.raises(Refused, match="begun with another sampling;"):
            run(spec(model, path, n=n), STUB)


@pytest.mark.parametrize("suffix", [".parquet", ""])
def test_shards_with_samples_together_are_one_run(
    tmp_path: Path, model: Path, engine: Callable[[str], str], suffix: str
) -> None:
    path = write(tmp_path / "in.parquet", prompt=[*prompts(30), None])
    merged, whole = tmp_path / f"all{suffix}", tmp_path / f"whole{suffix}"
    outputs = [sharded(tmp_path / f"out{suffix}", i, 3) for i in range(3)]
    for i, output in enumerate(outputs):
        run(spec(model, path, output=output, shard=(i, 3), sampling=WARM, n=3), engine("DrawsLastFirst"))
    assert merge_shards(outputs, merged, overwrite=False) == 31
    run(spec(model, path, output=whole, sampling=WARM, n=3), engine("DrawsLastFirst"))
    check(whole, 3)
    assert table_of(merged).equals(table_of(whole))


def test_new_rows_of_a_table_that_grows_have_samples(tmp_path: Path, model: Path, engine: Callable[[str], str]) -> None:
    def grow(rows: int, **fields: Any) -> Report:
        path = write(tmp_path / "in.parquet", prompt=prompts(rows), id=list(range(rows)))
        job = spec(model, path, output=tmp_path / "out", incremental=True, id_column="id", sampling=WARM, **fields)
        return incremental.run_new_rows(job, lambda job: run(job, engine("DrawsLastFirst")))

    assert [grow(rows, n=3).rows for rows in (5, 8)] == [5, 3]
    assert [len(samples) for samples in table_of(tmp_path / "out")["samples"].to_pylist()] == [3] * 8
    verify(tmp_path / "out")
    with pytest.raises(Refused, match="begun with another sampling;"):
        grow(9, n=2)


def test_no_rows_give_an_output_with_the_column(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=pa.array([], pa.string()))
    run(spec(model, path, n=2), STUB)
    assert check(tmp_path / "out.parquet", 2).schema.names[-1] == "samples"


def test_a_column_of_that_name_is_refused_only_where_it_clashes(tmp_path: Path, model: Path) -> None:
    theirs = [[{"completion_tokens": i}] for i in range(3)]
    path = write(tmp_path / "in.parquet", prompt=prompts(3), samples=theirs)
    with pytest.raises(Refused, match="has a column 'samples', which the output adds itself"):
        run(spec(model, path, n=2), STUB)
    run(spec(model, path, columns=("prompt", "samples")), STUB)
    verify(tmp_path / "out.parquet")
    assert table_of(tmp_path / "out.parquet")["samples"].to_pylist() == theirs


def test_a_sample_that_was_changed_is_found(tmp_path: Path, model: Path, engine: Callable[[str], str]) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(5))
    run(spec(model, path, sampling=WARM, n=3), engine("DrawsLastFirst"))
    output, report = tmp_path / "out.parquet", tmp_path / "out.run" / "report.json"
    table = table_of(output)
    rows = table["samples"].to_pylist()
    rows[2][1]["completion_tokens"] += 1
    place = table.schema.get_field_index("samples")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(rows, table["samples"].type)), output)
    with pytest.raises(Refused, match=r"out\.parquet was changed: its sha256"):
        verify(output)
    values = json.loads(report.read_text())
    values["output_sha256"] = job.digest_of(output)
    report.write_text(json.dumps(values))
    with pytest.raises(
        Refused, match=rf"counts 5 rows .* {tokens_of(table) + 1} completion tokens, but the parts hold"
    ):
        verify(output)


@pytest.mark.parametrize("n", [0, -1, 129])
def test_too_few_and_too_many_are_refused(tmp_path: Path, model: Path, n: int) -> None:
    with pytest.raises(UsageError, match=f"--n is {n}; it must be from 1 to 128"):
        spec(model, tmp_path / "in.parquet", n=n)


def test_the_flag_and_the_key(tmp_path: Path) -> None:
    arguments = ["in.parquet", "-o", "out.parquet", "--model", "m"]
    (tmp_path / "job.toml").write_text("n = 6")
    config = ["--config", str(tmp_path / "job.toml")]
    jobs = [job_of([*arguments, *more]) for more in ([], ["--n", "4"], config, [*config, "--n", "2"])]
    assert [job.n for job in jobs] == [1, 4, 6, 2]


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job of three samples on the demo model, and its prompts."""
    folder = tmp_path_factory.mktemp("real")
    write(folder / "in.parquet", prompt=[f"def {name}(self, x):\n    " for name in ("read", "write")])
    run(job_on_target(folder, n=3, output=folder / "out.parquet"))
    return folder


def job_on_target(folder: Path, **fields: Any) -> JobSpec:
    params = SamplingParams(max_tokens=6, temperature=1.0)
    return spec(TARGET, folder / "in.parquet", sampling=params, dtype="float32", max_model_len=64, **fields)


def test_samples_of_a_real_model_differ_and_the_first_is_that_of_a_job_without(answered: Path) -> None:
    table = check(answered / "out.parquet", 3)
    assert all(len(set(samples)) == 3 for samples in samples_in(table))
    run(job_on_target(answered, output=answered / "one.parquet"))
    assert table["generated_text"].equals(table_of(answered / "one.parquet")["generated_text"])


def test_each_sample_is_what_its_seed_gives_alone(answered: Path) -> None:
    """Of an engine that has never heard of samples, one row at a time."""
    table = table_of(answered / "out.parquet")
    tokenizer = Tokenizer.load(TARGET)
    engine = engine_of(TARGET, tokenizer, dtype="float32", max_model_len=64)
    params = SamplingParams(max_tokens=6, temperature=1.0)
    source = job.PromptSource(job_on_target(answered), tokenizer, 64, table.schema)
    requests, _ = source.tokenize(0, table.to_batches()[0])
    wanted = []
    for i, seed in enumerate(sampled(wanting(requests, 3)).seeds.tolist()):
        prompt = requests.token_ids[requests.offsets[i // 3] : requests.offsets[i // 3 + 1]].tolist()
        answer = tokens(engine, Requests.of([prompt], params, seeds=[seed]))[0]
        wanted.append(tokenizer.decode_batch(np.array(answer, np.int32), np.array([0, len(answer)]))[0])
    assert [text for samples in samples_in(table) for text in samples] == wanted
