"""A table that grows from run to run: each row runs once, whatever happens in between."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stub_jobs import STUB, expected, spec

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Interrupted, Refused, UsageError
from batchinfer.jobs import incremental
from batchinfer.jobs.incremental import row_keys, run_new_rows
from batchinfer.jobs.job import run
from batchinfer.jobs.report import Report, read_report
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.verify import verify


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Callable[..., JobSpec]:
    def make(**fields: Any) -> JobSpec:
        inputs = sorted(tmp_path.glob("in*"))
        defaults = {"id_column": "id", "incremental": True, "output": tmp_path / "answers"}
        return spec(model, *inputs, **{**defaults, **fields})

    return make


def save(path: Path, ids: list[Any], texts: list[str | None] | None = None) -> Path:
    texts = texts or [f"text of {i}" for i in ids]
    pq.write_table(pa.table({"id": ids, "prompt": pa.array(texts, pa.string()), "more": ["m"] * len(ids)}), path)
    return path


def once(job: JobSpec) -> Report:
    return run_new_rows(job, lambda spec: run(spec, STUB))


def answers(output: Path) -> Counter[tuple[Any, Any]]:
    table = pq.read_table(output)
    return Counter(zip(table["id"].to_pylist(), table["generated_text"].to_pylist(), strict=True))


def test_only_rows_that_are_new_run(tmp_path: Path, model: Path, job: Callable[..., JobSpec]) -> None:
    save(tmp_path / "in1.parquet", list(range(10)))
    assert once(job()).rows == 10
    save(tmp_path / "in1.parquet", list(range(12)))  # a file that grew
    assert once(job()).rows == 2
    save(tmp_path / "in2.parquet", [100, 101])  # and one more
    assert once(job()).rows == 2
    files = sorted((tmp_path / "answers").iterdir())
    assert [path.name for path in files] == ["part-000001.parquet", "part-000002.parquet", "part-000003.parquet"]
    ids = [*range(12), 100, 101]
    wanted = expected(model, [f"text of {i}" for i in ids])
    assert answers(tmp_path / "answers") == Counter(zip(ids, wanted, strict=True))
    assert len(verify(tmp_path / "answers")) == 6
    assert read_report(tmp_path / "answers").rows == 2


def test_without_new_rows_nothing_is_run_or_written(
    tmp_path: Path, job: Callable[..., JobSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in.parquet", [1, 2])
    first = once(job())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert once(job()) == first
    assert "no new rows since" in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {path for path in before if before[path] != after.get(path)} <= {tmp_path / "answers.run" / "lock"}
    assert after.keys() == before.keys()


def test_a_row_whose_content_changed_runs_again_and_others_do_not(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    save(tmp_path / "in.parquet", [1, 2, 3], ["a", "b", "c"])
    once(job())
    save(tmp_path / "in.parquet", [3, 2, 1], ["c", "changed", "a"])
    assert once(job()).rows == 1
    table = pq.read_table(tmp_path / "answers" / "part-000002.parquet")
    assert table["id"].to_pylist() == [2] and table["prompt"].to_pylist() == ["changed"]


def test_the_first_run_of_an_empty_table_leaves_an_empty_file(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    pq.write_table(pa.table({"id": pa.array([], pa.int64()), "prompt": pa.array([], pa.string())}), tmp_path / "in.pq")
    assert once(job()).rows == 0
    assert pq.read_table(tmp_path / "answers").column_names[:2] == ["id", "prompt"]
    assert once(job()).rows == 0 and len(list((tmp_path / "answers").iterdir())) == 1


def test_files_that_are_new_in_a_folder_are_picked_up(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "b.parquet", [1, 2])
    (tmp_path / "in" / "_SUCCESS").touch()
    assert once(job()).rows == 2
    save(tmp_path / "in" / "a.parquet", [3])
    assert once(job()).rows == 1
    assert pq.read_table(tmp_path / "answers")["id"].to_pylist() == [1, 2, 3]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", ["rename", "run"])
def test_a_killed_run_goes_on_with_its_own_rows_and_then_takes_the_new_ones(
    tmp_path: Path, model: Path, job: Callable[..., JobSpec], at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "in.parquet", list(range(5)))
    once(job())
    save(tmp_path / "in.parquet", list(range(8)))

    def killed(*_: object) -> Any:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if at == "rename":
            patch.setattr(Path, "rename", killed)
        run_new_rows(job(), killed if at == "run" else lambda spec: run(spec, STUB))
    save(tmp_path / "in.parquet", [*range(2, 8), 20, 21])
    once(job())
    ids = [*range(8), 20, 21]
    wanted = expected(model, [f"text of {i}" for i in ids])
    assert answers(tmp_path / "answers") == Counter(zip(ids, wanted, strict=True))
    verify(tmp_path / "answers")


def test_rows_that_failed_run_again_in_their_own_file(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    save(tmp_path / "in.parquet", [1, 2, 3], ["a", None, "c"])
    assert once(job()).rows_failed == 1
    save(tmp_path / "in.parquet", [1, 2, 3, 4], ["a", None, "c", "d"])
    assert once(job()).rows == 1
    save(tmp_path / "in.parquet", [5], ["e"])
    once(job(retry_errors=True))
    assert sorted(id for id, _ in answers(tmp_path / "answers")) == [1, 2, 3, 4, 5]
    assert read_report(tmp_path / "answers" / "part-000001.parquet").rows_computed == 1


@pytest.mark.parametrize("fields", [{"seed": 1}, {"columns": ("id",)}, {"prompt_column": "more"}])
def test_another_job_is_refused(tmp_path: Path, job: Callable[..., JobSpec], fields: dict[str, Any]) -> None:
    save(tmp_path / "in.parquet", [1])
    once(job())
    with pytest.raises(Refused, match=r"was begun with another (sampling|columns|template)"):
        once(job(**fields))


def test_a_column_of_another_type_is_refused(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    save(tmp_path / "in.parquet", [1])
    once(job())
    save(tmp_path / "in.parquet", ["1", "two"])
    with pytest.raises(Refused, match="column 'id' is string; in earlier runs it was int64"):
        once(job())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id_column": None}, "--incremental needs --id-column"),
        ({"shard": (0, 2)}, "leave --shard out"),
        ({"overwrite": True}, "leave --overwrite out"),
        ({"resume": False}, "leave --no-resume out"),
        ({"output": Path("out.parquet")}, "must be a folder"),
    ],
)
def test_flags_that_do_not_go_together(
    tmp_path: Path, job: Callable[..., JobSpec], fields: dict[str, Any], message: str
) -> None:
    save(tmp_path / "in.parquet", [1])
    with pytest.raises(UsageError, match=message):
        once(job(**fields))


def test_with_and_without_incremental_do_not_mix(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    save(tmp_path / "in.parquet", [1])
    once(job())
    with pytest.raises(Refused, match="was begun with --incremental"):
        run(job(incremental=False), STUB)
    run(job(incremental=False, output=tmp_path / "whole"), STUB)
    with pytest.raises(Refused, match="was begun without --incremental"):
        once(job(output=tmp_path / "whole"))


def test_two_at_once_do_not_meet(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    save(tmp_path / "in.parquet", [1])

    def second(spec: JobSpec) -> Report:
        with pytest.raises(Interrupted, match="another run is at work"):
            once(job())
        return run(spec, STUB)

    run_new_rows(job(), second)


def test_a_run_without_new_rows_is_a_success_for_whoever_watches(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    save(tmp_path / "in.parquet", [1])
    file = tmp_path / "job.prom"
    found = []
    for _ in range(2):
        once(job(metrics_textfile=file))
        lines = dict(line.rsplit(" ", 1) for line in file.read_text().splitlines() if not line.startswith("#"))
        found.append(float(lines[f'batchinfer_job_last_success_time_seconds{{output="{tmp_path / "answers"}"}}']))
    assert found[1] > found[0]


def test_a_run_that_is_refused_is_seen_by_whoever_watches(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    save(tmp_path / "in.parquet", [1])
    once(job(metrics_textfile=tmp_path / "job.prom"))
    save(tmp_path / "in.parquet", [1, 1])
    with pytest.raises(Refused, match="the same id"):
        once(job(metrics_textfile=tmp_path / "job.prom"))
    lines = (tmp_path / "job.prom").read_text()
    assert f'batchinfer_job_exit_code{{output="{tmp_path / "answers"}"}} 65' in lines and "last_success_time" in lines


def test_rows_that_changed_while_they_were_set_aside_block_no_later_run(
    tmp_path: Path, job: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "a"}\n')
    seen = incremental._seen

    def grows(*arguments: Any) -> Any:
        with (tmp_path / "in.jsonl").open("a") as file:
            file.write('{"id": 1, "prompt": "b"}\n')
        return seen(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Refused, match="the same id"):
        patch.setattr(incremental, "_seen", grows)
        once(job())
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "a"}\n')
    assert once(job()).rows == 1


def test_json_lines_with_values_that_are_no_text(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    lines = [{"id": 1, "prompt": "a"}, {"id": 2, "prompt": [7]}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert once(job()).rows_failed == 1
    assert once(job()).rows == 2, "the report of the run before: nothing is new"
    assert len(list((tmp_path / "answers").iterdir())) == 1


CALLS: list[Any] = [{"b": 1, "a": 2}, {"a": 1.5}, {"c": None}]
CHAT_AS_TEXT = json.dumps([{"role": "user", "content": "x", "calls": 3}])
VALUES: list[Any] = [3, 1.5, "x", [True, "é"], None]


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"messages_column": "x"}, [[{"role": "user", "content": "x", "calls": call}] for call in CALLS]),
        ({"messages_column": "x"}, [*([{"role": "user", "content": "x", "calls": c}] for c in CALLS), CHAT_AS_TEXT]),
        ({"prompt_template": "<{x}>"}, VALUES),
        ({"prompt_template": "<{x}>"}, VALUES[:2]),
    ],
    ids=["messages", "messages and text", "values", "numbers"],
)
def test_rows_that_were_set_aside_have_the_prompts_that_they_have_in_an_ordinary_run(
    tmp_path: Path, job: Callable[..., JobSpec], model: Path, fields: dict[str, Any], values: list[Any]
) -> None:
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].calls | tojson }}"}))
    rows = [{"id": i, "x": value} for i, value in enumerate(values)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"prompt_column": None, "sampling": SamplingParams(max_tokens=60), **fields}
    once(job(**given))
    run(job(**given, incremental=False, output=tmp_path / "whole"), STUB)
    assert pq.read_table(tmp_path / "answers").equals(pq.read_table(tmp_path / "whole"))
    # An answer of this engine is the prompt.
    wanted = [
        value[0]["calls"] if isinstance(value, list) and fields.get("messages_column") else value for value in values
    ]
    found = pq.read_table(tmp_path / "whole")["generated_text"].to_pylist()
    if "messages_column" in fields:
        assert [json.loads(text) for text in found] == [3 if w is CHAT_AS_TEXT else w for w in wanted]
    else:
        texts = [w if isinstance(w, str) else json.dumps(w, ensure_ascii=False) for w in wanted]
        assert found == [None if w is None else f"<{text}>" for w, text in zip(wanted, texts, strict=True)]


def test_columns_that_pyarrow_cannot_filter_are_set_aside_too(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    def grow(n: int) -> pa.Table:
        texts = pa.array([f"text {i}" for i in range(n)], pa.string_view())
        as_json = pa.array([f"[{i}]" for i in range(n)], pa.json_(pa.string_view()))
        lists = pa.array([[f"{i}"] for i in range(n)], pa.list_(pa.string_view()))
        return pa.table({"id": texts, "prompt": texts, "json": as_json, "lists": lists})

    pq.write_table(grow(3), tmp_path / "in.parquet")
    once(job())
    grown = grow(9)
    pq.write_table(pa.concat_tables([grown.slice(2, 2), grown.slice(1, 1), grown.slice(5, 1)]), tmp_path / "in.parquet")
    sampled = job(sampling=SamplingParams(max_tokens=8))
    assert once(sampled).rows == 2
    kept = pq.read_table(tmp_path / "answers" / "part-000002.parquet").select(grown.column_names)
    assert kept.equals(pa.concat_tables([grown.slice(3, 1), grown.slice(5, 1)]))


def test_keys_tell_values_apart_and_types_of_text_not() -> None:
    def keys(*columns: pa.Array) -> list[bytes]:
        names = [str(i) for i in range(len(columns))]
        return row_keys(pa.record_batch(list(columns), names), names).tolist()

    pairs = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), (None, "abc"), ("abc", None), ("a\0", ""), ("a", "\0")]
    first, second = ([pair[i] for pair in pairs] for i in range(2))
    texts = keys(pa.array(first), pa.array(second))
    assert len(set(texts)) == len(pairs)
    assert keys(pa.array(first, pa.large_string()), pa.array(second).dictionary_encode()) == texts
    messages = pa.array([[{"role": "user", "content": c}] for c in "abca"])
    nested = keys(messages)
    assert nested[0] == nested[3] and len(set(nested)) == 3


def test_keys_are_found_among_others(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 3, (4000, incremental.KEY_BYTES), np.uint8)  # many zero bytes, at the end too
    keys = np.array([row.tobytes() for row in raw], f"S{incremental.KEY_BYTES}")
    known = np.sort(keys[:2000])
    wanted = {row.tobytes() for row in raw[:2000]}
    assert incremental._among(keys, known).tolist() == [row.tobytes() in wanted for row in raw]
