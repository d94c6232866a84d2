"""Jobs over chosen rows: what is not chosen is not there for shards, resuming, growing tables, plans and checks."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import call
from stub_jobs import ENGINES, SCRIPT, STUB, counts, expected, prompts, recount, spec, write

from batchinfer.engine.request import Requests, RowError
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.canary import canary_rows
from batchinfer.jobs.incremental import run_new_rows
from batchinfer.jobs.job import run
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.outlook import plan
from batchinfer.jobs.spec import sharded
from batchinfer.jobs.tables.selection import Selection
from batchinfer.jobs.tables.table import Table
from batchinfer.jobs.verify import verify

N = 600
LANGUAGES = ["de", None, "en"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(
        tmp_path / "in.parquet", id=list(range(N)), prompt=prompts(N), lang=[LANGUAGES[i % 3] for i in range(N)]
    )


def ids(output: Path) -> list[int]:
    found: list[int] = pq.read_table(output)["id"].to_pylist()
    return found


def test_the_output_has_the_chosen_rows_alone(path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(spec(model, path, where="lang == 'de' and id >= 300", columns=("id", "prompt")), STUB)
    output = path.with_name("out.parquet")
    wanted = [i for i in range(300, N) if i % 3 == 0]
    assert ids(output) == wanted and report.rows == len(wanted) == 100
    assert pq.read_table(output)["generated_text"].to_pylist() == expected(model, [prompts(N)[i] for i in wanted])
    assert counts(report) == recount(output)
    assert "100 of 600 rows are selected (--where)" in report.notes
    assert "100 of 600 rows are selected (--where)" in capsys.readouterr().err
    assert verify(output)[0].startswith(f"{output}: 100 rows")


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
def test_few_rows_far_apart(path: Path, model: Path, name: str) -> None:
    """Most batches have none of them."""
    output = path.with_name(name)
    run(spec(model, path, where="id in [1, 599]", output=output), STUB)
    read = pq.read_table(output).to_pylist() if name == "out.parquet" else map(json.loads, output.open())
    texts = expected(model, [prompts(N)[i] for i in (1, 599)])
    assert [(row["id"], row["generated_text"]) for row in read] == [(1, texts[0]), (599, texts[1])]
    verify(output)


def test_no_row_chosen_is_an_empty_output(path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = path.with_name("out.parquet")
    arguments = ["run", path, "-o", output, "--model", model, "--where", "id < 0"]
    assert call(capsys, *arguments) == (0, "")
    empty = pq.read_table(output)
    assert len(empty) == 0 and empty.column_names[:4] == ["id", "prompt", "lang", "generated_text"]
    assert empty.schema.field("id").type == pa.int64()
    capsys.readouterr()
    assert call(capsys, *arguments, "--overwrite") == (0, "")
    verify(output)


def test_no_row_chosen_is_said(path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(spec(model, path, where="id < 0"), STUB)
    assert "0 of 600 rows are selected (--where): the output has no rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields", [{"where": "lang is None"}, {"sample": 100}, {"where": "id > 9", "sample": 90, "limit": 50}]
)
@pytest.mark.parametrize("count", [1, 3])
def test_merged_shards_are_the_output_without_shards(
    path: Path, model: Path, count: int, fields: dict[str, Any]
) -> None:
    whole = path.with_name("whole.parquet")
    fields |= {"id_column": "id"}
    run(spec(model, path, output=whole, **fields), STUB)
    shards = [sharded(path.with_name("out.parquet"), i, count) for i in range(count)]
    for i, shard in enumerate(shards):
        run(spec(model, path, output=shard, shard=(i, count), **fields), STUB)
    merge_shards(shards, path.with_name("out.parquet"), overwrite=False)
    assert pq.read_table(path.with_name("out.parquet")).equals(pq.read_table(whole))


def test_shards_of_another_selection_are_not_merged(path: Path, model: Path) -> None:
    shards = [sharded(path.with_name("out.parquet"), i, 2) for i in range(2)]
    for i, shard in enumerate(shards):
        run(spec(model, path, output=shard, shard=(i, 2), limit=100 + i), STUB)
    with pytest.raises(Refused, match="has another selection"):
        merge_shards(shards, path.with_name("out.parquet"), overwrite=False)


@pytest.mark.parametrize("flags", [["--where", "lang is not None and id != 7"], ["--sample", "200", "--seed", "3"]])
def test_a_killed_job_goes_on_with_the_same_rows(path: Path, model: Path, flags: list[str]) -> None:
    folder = path.parent
    (folder / "engines_of_the_test.py").write_text(ENGINES)
    (folder / "main.py").write_text(textwrap.dedent(SCRIPT))
    start = [sys.executable, folder / "main.py", folder, "run", path, "-o", folder / "out.parquet"]
    command = [*map(str, start), "--model", str(model), "--commit-rows", "20", "--max-tokens", "8", *flags]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((folder / "out.run" / "parts").glob("*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    fields: dict[str, Any] = {"where": flags[1]} if flags[0] == "--where" else {"sample": 200, "seed": 3}
    with pytest.raises(Refused, match="was begun with another selection"):
        run(spec(model, path, seed=fields.get("seed", 0), limit=300), STUB)
    report = run(spec(model, path, **fields), STUB)
    undisturbed = folder / "undisturbed.parquet"
    run(spec(model, path, output=undisturbed, **fields), STUB)
    assert 40 <= report.rows_resumed < report.rows
    assert pq.read_table(folder / "out.parquet").equals(pq.read_table(undisturbed))
    verify(folder / "out.parquet")


def test_another_choice_of_other_rows_is_another_job(path: Path, model: Path) -> None:
    run(spec(model, path, sample=10, seed=1), STUB)
    for fields in ({}, {"sample": 11}, {"sample": 10, "limit": 9}, {"where": "id > 3", "sample": 10}):
        with pytest.raises(Refused, match="was begun with another selection"):
            run(spec(model, path, seed=1, **fields), STUB)
    with pytest.raises(Refused, match="was begun with another sampling and selection"):
        run(spec(model, path, sample=10, seed=2), STUB)


def test_a_plan_counts_the_chosen_rows(path: Path, model: Path) -> None:
    found = plan(spec(model, path, where="lang == 'de'", limit=50, device="cpu"))
    assert (found.rows, found.rows_to_run) == (50, 50)
    assert "50 of 600 rows are selected (--where, --limit)" in found.notes


def test_a_growing_table_gives_its_new_rows_that_fulfil_the_condition(tmp_path: Path, model: Path) -> None:
    def once(n: int) -> int:
        write(tmp_path / "in.parquet", id=list(range(n)), prompt=prompts(n), lang=["de", "en"] * (n // 2))
        job = spec(
            model, tmp_path / "in.parquet", output=tmp_path / "out", id_column="id", incremental=True,
            where="lang == 'de'", columns=("id",),
        )  # fmt: skip
        return run_new_rows(job, lambda each: run(each, STUB)).rows

    assert [once(20), once(30)] == [10, 5]
    assert ids(tmp_path / "out") == list(range(0, 30, 2))
    verify(tmp_path / "out")


class Words:
    """Rows whose prompt is their ordinal."""

    columns = ("prompt",)

    def tokenize(self, first: int, batch: pa.RecordBatch) -> tuple[Requests, dict[int, RowError]]:
        requests = Requests.of([[1]] * len(batch), SamplingParams())
        return Requests(
            first + requests.rows, requests.token_ids, requests.offsets, requests.seeds, requests.params,
            requests.param_index,
        ), {}  # fmt: skip


def test_a_canary_is_spread_over_the_chosen_rows(path: Path) -> None:
    table = Selection("id >= 100 and id < 110 or id >= 590", None, None, 0).of(Table.open([path]))
    prompts: Any = Words()
    assert canary_rows(table, prompts, 5).rows.tolist() == [0, 4, 8, 12, 16]


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--where", "langg == 'de'"], 65, "in.parquet has no such column; did you mean 'lang'?"),
        (["--where", "lang = 'de'"], 2, "--where is no expression"),
        (["--where", "id == 'de'"], 65, "--where compares column 'id', which is int64, with 'de' at character 7"),
        (["--limit", "0"], 2, "--limit is 0; it must be 1 or more"),
        (["--sample", "-1"], 2, "--sample is -1; it must be 1 or more"),
    ],
)
def test_bad_selections_are_refused_in_one_line(
    path: Path, model: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, said: str
) -> None:
    output = path.with_name("out.parquet")
    found, line = call(capsys, "run", path, "-o", output, "--model", model, *flags)
    assert (found, said in line) == (code, True), line
    assert not output.exists() and not path.with_name("out.run").exists()


def test_a_sample_of_a_growing_table_is_refused(path: Path, model: Path) -> None:
    with pytest.raises(UsageError, match="--incremental with --sample 5 would add rows each time"):
        spec(model, path, incremental=True, id_column="id", sample=5)


def test_a_limit_without_a_condition_reads_no_further(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.parquet", x=np.arange(10)) for name in "ab"]
    table = Selection("x >= 5", None, 3, 0).of(Table.open(files))
    files[1].write_bytes(b"damaged")
    assert [batch["x"].to_pylist() for _, batch in table.batches(["x"], 100)] == [[5, 6, 7]]
