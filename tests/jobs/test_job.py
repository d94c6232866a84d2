"""Whole jobs with an engine that computes nothing: what comes out, what is refused, what a fault leaves behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stub_jobs import CONTEXT, SCRIPT, STUB, counts, expected, limit, make_model, prompts, recount, spec, write

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import EngineFailed, Refused
from batchinfer.jobs.fingerprints import fingerprints
from batchinfer.jobs.job import run
from batchinfer.jobs.report import read_report
from batchinfer.jobs.rows.windows import Limits
from batchinfer.jobs.tables.table import Table


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("window_rows", [1, 64, 100_000])
def test_every_row_is_answered_in_input_order(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, window_rows: int
) -> None:
    n = 40 if window_rows == 1 else 1000
    limit(monkeypatch, Limits(slice_rows=min(window_rows, 32), chunk_rows=50, window_rows=window_rows))
    texts = prompts(n)
    path = write(tmp_path / "in.parquet", id=list(range(n)), prompt=texts, extra=np.arange(n) / 3)
    report = run(spec(model, path, commit_rows=100), STUB)
    table = pq.read_table(tmp_path / "out.parquet", page_checksum_verification=True)
    assert table.select(["id", "prompt", "extra"]).equals(pq.read_table(path))
    assert table["generated_text"].to_pylist() == expected(model, texts)
    assert table["completion_tokens"].to_pylist() == [8] * n
    assert set(table["finish_reason"].to_pylist()) == {"length"}
    assert counts(report) == recount(tmp_path / "out.parquet")
    assert read_report(tmp_path / "out.parquet") == report


def test_bad_rows_get_an_error_of_their_own(tmp_path: Path, model: Path) -> None:
    texts = ["good", None, "", "y " * CONTEXT, "fine"]
    path = write(tmp_path / "in.parquet", prompt=texts)
    report = run(spec(model, path), STUB)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["finish_reason"].to_pylist() == ["stop", "error", "error", "error", "stop"]
    assert table["error_code"].to_pylist() == [None, "null_prompt", "empty_prompt", "too_long", None]
    assert table["generated_text"].to_pylist() == ["good", None, None, None, "fine"]
    assert table["prompt_tokens"].null_count == table["completion_tokens"].null_count == 3
    assert all(table["error_message"].to_pylist()[1:4])
    assert counts(report) == recount(tmp_path / "out.parquet")


def test_rows_that_the_engine_failed(tmp_path: Path, model: Path, engine: Callable[[str], str]) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(10))
    report = run(spec(model, path), engine("Fails"))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["error_code"].to_pylist() == [None, "not_finite"] * 5
    assert table["error_message"].to_pylist()[1] == "row 1"
    assert table["generated_text"].null_count == 5
    assert counts(report) == recount(tmp_path / "out.parquet")


def test_text_ends_before_the_first_stop_string(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=["one END two", "one STOP two END", "plain"])
    run(spec(model, path, sampling=SamplingParams(max_tokens=40, stop=("END", "STOP"))), STUB)
    assert pq.read_table(tmp_path / "out.parquet")["generated_text"].to_pylist() == ["one ", "one ", "plain"]


def test_rows_near_the_context_get_as_many_tokens_as_fit(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, Limits(slice_rows=3))
    lengths = [60, 5, 63, 57, 2, 60, 62, 61]
    path = write(tmp_path / "in.parquet", prompt=["x" * length for length in lengths])
    run(spec(model, path), STUB)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["prompt_tokens"].to_pylist() == lengths
    assert table["completion_tokens"].to_pylist() == [min(n, 8, CONTEXT - n) for n in lengths]


def test_columns_chooses_and_orders(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", a=[1], prompt=["p"], b=[2])
    run(spec(model, path, columns=("b", "a")), STUB)
    assert pq.read_schema(tmp_path / "out.parquet").names[:3] == ["b", "a", "generated_text"]


def test_several_inputs_are_one_table(tmp_path: Path, model: Path) -> None:
    first = write(tmp_path / "a.parquet", prompt=prompts(5))
    second = write(tmp_path / "b.parquet", prompt=["last"])
    run(spec(model, first, second), STUB)
    assert pq.read_table(tmp_path / "out.parquet")["prompt"].to_pylist() == [*prompts(5), "last"]


def test_json_lines_in(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "n": {"x": 1}}\n{"prompt": 5}\n')
    run(spec(model, path), STUB)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["n"].to_pylist() == [{"x": 1}, None]
    assert table["error_code"].to_pylist() == [None, "wrong_type"]


def test_no_rows_give_a_whole_empty_output(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=pa.array([], pa.string()))
    assert run(spec(model, path), STUB).rows == 0
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 0


def test_parts_are_committed_by_rows(tmp_path: Path, model: Path, engine: Callable[[str], str]) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(40))
    run(spec(model, path, commit_rows=16), engine("Slow"))
    manifest = json.loads((tmp_path / "out.run" / "manifest.json").read_text())
    assert sum(part["rows"] for part in manifest["parts"]) == 40
    assert len(manifest["parts"]) >= 2


def test_parts_are_committed_by_seconds(tmp_path: Path, model: Path, engine: Callable[[str], str]) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(60))
    run(spec(model, path, commit_seconds=0.05), engine("Slow"))
    assert len(json.loads((tmp_path / "out.run" / "manifest.json").read_text())["parts"]) >= 2


def test_the_cache_is_as_large_as_the_plan_says(tmp_path: Path, model: Path, engine: Callable[[str], str]) -> None:
    # 3 rows side by side at most; 9 tokens and 8 new ones round up to 2 blocks of 16.
    path = write(tmp_path / "in.parquet", prompt=[f"12345678{i}" for i in range(5)])
    report = run(spec(model, path, max_num_seqs=3, block_size=16), engine("Remembers"))
    assert report.notes == ["96 tokens of KV"]


def test_later_rows_may_be_longer_than_the_first_window(
    tmp_path: Path, model: Path, engine: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, Limits(slice_rows=5, window_rows=5))
    path = write(tmp_path / "in.parquet", prompt=[f"12345678{i}" for i in range(10)])
    report = run(spec(model, path, max_num_seqs=3, block_size=16), engine("Remembers"))
    assert report.notes == ["192 tokens of KV"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_column": "text"}, "no column 'text'"),
        ({"columns": ("id", "nope")}, "no column 'nope'"),
        ({"columns": ("id", "finish_reason")}, "column 'finish_reason', which the output adds"),
        ({"prompt_column": "id"}, "expected text"),
        ({"tokenizer": "/nowhere"}, "/nowhere"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_what_is_refused_leaves_nothing(tmp_path: Path, model: Path, fields: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "in.parquet", id=[1], prompt=["p"], finish_reason=["x"])
    with pytest.raises(Refused, match=message):
        run(spec(model, path, **{"columns": ("id",)} | fields), STUB)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.parquet"]


def test_a_clash_of_columns_names_the_remedy(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=["p"], generated_text=["old"])
    with pytest.raises(Refused, match=r"'generated_text'.*--columns"):
        run(spec(model, path), STUB)
    run(spec(model, path, columns=("prompt",)), STUB)


def test_an_unreadable_file_is_refused(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "in.parquet"
    path.write_bytes(b"PAR1 rubbish PAR1")
    with pytest.raises(Refused, match=r"in\.parquet cannot be read"):
        run(spec(model, path), STUB)


def test_a_model_that_does_not_load_is_refused(tmp_path: Path, model: Path, engine: Callable[[str], str]) -> None:
    path = write(tmp_path / "in.parquet", prompt=["p", None])
    with pytest.raises(Refused, match=r"tensor x is missing"):
        run(spec(model, path), engine("refuse"))
    assert not (tmp_path / "out.run").exists(), "the row that failed before holds no other settings back"


def test_jobs_that_may_take_different_products_carry_different_fingerprints(tmp_path: Path, model: Path) -> None:
    job = spec(model, write(tmp_path / "in.parquet", prompt=["1"]))
    few, some, many = (
        fingerprints(job, Table.open(job.inputs).files, model, "", EngineConfig(model, expected_batch=n), [])
        for n in (1, 4, 5)
    )
    assert few == some
    assert {name for name in few if few[name] != many[name]} == {"quantization"}


def test_too_many_errors_end_the_job(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=["a", "", None, "d"])
    with pytest.raises(Refused, match=r"2 of 4 rows failed \(.*empty_prompt 1.*more than --max-error-rate 0.4"):
        run(spec(model, path, max_error_rate=0.4), STUB)
    assert not (tmp_path / "out.parquet").exists()
    run(spec(model, path, max_error_rate=0.5, overwrite=True), STUB)


def test_all_rows_may_fail(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=["", ""])
    assert run(spec(model, path), STUB).rows_failed == 2


def committed_rows(tmp_path: Path) -> list[int]:
    files = (tmp_path / "out.run" / "parts").glob("*.parquet")
    return sorted(row for file in files for row in pq.read_table(file)["row"].to_pylist())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Hopeless", r"was killed by SIGSEGV; its log is .*worker\.log"),
        ("Forgets", "the engine ended with 40 rows unfinished"),
        ("break_down", "the engine failed: KeyError in engines_of_the_test"),
        ("NotThere", "the engine failed: AttributeError"),
    ],
)
def test_a_fault_of_the_engine_itself_ends_the_job(
    tmp_path: Path, model: Path, engine: Callable[[str], str], name: str, message: str
) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(40))
    with pytest.raises(EngineFailed, match=message):
        run(spec(model, path), engine(name))
    assert not (tmp_path / "out.parquet").exists()
    assert committed_rows(tmp_path) == []
    log = (tmp_path / "out.run" / "worker.log").read_text()
    assert ("Traceback" in log) == (name not in ("Hopeless", "Forgets"))


@pytest.mark.parametrize(
    ("name", "said"),
    [("Dies", "was killed by SIGKILL (out of memory?)"), ("Raises", "RuntimeError in engines_of_the_test, line ")],
)
def test_an_engine_that_dies_now_and_then_is_started_again(
    tmp_path: Path, model: Path, engine: Callable[[str], str], name: str, said: str
) -> None:
    """After each third step, whatever the rows: every row is answered all the same."""
    path = write(tmp_path / "in.parquet", prompt=prompts(40))
    report = run(spec(model, path, max_num_seqs=64, max_num_batched_tokens=256), engine(name))
    assert pq.read_table(tmp_path / "out.parquet")["generated_text"].to_pylist() == expected(model, prompts(40))
    assert report.rows_failed == 0 and counts(report) == recount(tmp_path / "out.parquet")
    assert report.notes[0].startswith("the engine died and was started again 3 times: ") and said in report.notes[0]
    halved = [note for note in report.notes if "at most 8 rows ran side by side, in steps of at most 64 tokens" in note]
    assert len(halved) == len(report.notes) - 1 == (name == "Dies"), "the system kills for lack of memory"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Poisoned", "was killed by SIGBUS"),
        ("Faults", "RuntimeError in engines_of_the_test, line "),
        ("Hangs", "took no step for"),
    ],
)
def test_rows_that_kill_the_engine_each_time_become_errors_and_no_others(
    tmp_path: Path, model: Path, engine: Callable[[str], str], name: str, said: str
) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(40))
    report = run(spec(model, path, step_timeout=1.0), engine(name))
    table = pq.read_table(tmp_path / "out.parquet")
    wrong = [i for i, reason in enumerate(table["finish_reason"].to_pylist()) if reason == "error"]
    assert wrong == [13, 30] and report.rows_by_error == {"engine_died": 2}
    assert said in table["error_message"][13].as_py()
    answers = expected(model, prompts(40))
    assert [text for i, text in enumerate(table["generated_text"].to_pylist()) if i not in wrong] == [
        text for i, text in enumerate(answers) if i not in wrong
    ]
    assert counts(report) == recount(tmp_path / "out.parquet")


@pytest.fixture
def slow_job(tmp_path: Path, model: Path, engine: Callable[[str], str]) -> subprocess.Popen[str]:
    """A job of the real command line that runs for some seconds; it has committed rows when this returns."""
    path = write(tmp_path / "in.parquet", prompt=prompts(2000))
    (tmp_path / "main.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, tmp_path / "main.py", tmp_path, "run", path, "-o", tmp_path / "out.parquet"]
    flags = ["--model", model, "--commit-rows", "40"]
    process = subprocess.Popen(
        list(map(str, command + flags)), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out.run" / "parts").glob("*")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    return process


def ended(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_commits_and_exits_75(tmp_path: Path, slow_job: subprocess.Popen[str], number: signal.Signals) -> None:
    children = psutil.Process(slow_job.pid).children(recursive=True)
    os.killpg(slow_job.pid, number)
    errors = slow_job.communicate(timeout=60)[1]
    assert slow_job.returncode == 75
    assert ended(children)
    rows = committed_rows(tmp_path)
    last = errors.splitlines()[-1]
    assert last.startswith(f"batchinfer: error: stopped after {len(rows):,} of 2,000 rows; they are committed in ")
    assert last.endswith("; give the same command to continue")
    assert 40 <= len(rows) < 2000
    assert len(set(rows)) == len(rows)
    assert not (tmp_path / "out.parquet").exists()


def test_a_killed_parent_leaves_whole_parts_and_no_child(tmp_path: Path, slow_job: subprocess.Popen[str]) -> None:
    children = psutil.Process(slow_job.pid).children(recursive=True)
    slow_job.kill()
    slow_job.communicate()
    assert ended(children)
    rows = committed_rows(tmp_path)
    assert rows
    assert len(set(rows)) == len(rows)
    assert not (tmp_path / "out.parquet").exists()
