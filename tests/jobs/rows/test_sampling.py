"""Sampling params of rows' own: what a row is sampled with, and what is wrong with others."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_models import chat_model
from stub_jobs import STUB, prompts, write, write_json_lines

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.job import run
from batchinfer.jobs.outlook import plan
from batchinfer.jobs.preflight import preflight
from batchinfer.jobs.spec import JobSpec

COLUMN = "sampling_params"


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of 520 tokens."""
    return chat_model(make_model, tmp_path_factory.mktemp("models"))


def job_of(model: Path, path: Path, **fields: Any) -> JobSpec:
    values: dict[str, Any] = {"prompt_column": "prompt", "sampling_params_column": COLUMN, **fields}
    values.setdefault("sampling", SamplingParams(max_tokens=6))
    return JobSpec(inputs=(path,), output=path.with_name("out.parquet"), model=str(model), **values)


def json_lines(path: Path, *rows: Any) -> Path:
    return write_json_lines(path, *({"prompt": f"hello {i}", COLUMN: row} for i, row in enumerate(rows)))


def sampled(job: JobSpec) -> dict[int, tuple[SamplingParams, int]]:
    """What the rows that can run are sampled with, and their samples."""
    found = preflight(job)
    requests, _ = found.source.tokenize(0, next(found.table.batches(found.source.columns, 1000))[1])
    assert requests.samples is not None or not job.samples_by_row
    samples = [1] * len(requests) if requests.samples is None else requests.samples.tolist()
    rows = zip(requests.rows.tolist(), requests.param_index, samples, strict=True)
    return {row: (requests.params[index], n) for row, index, n in rows}


def test_a_row_wins_over_the_flags_and_leaves_out_what_it_likes(model: Path, tmp_path: Path) -> None:
    base = SamplingParams(max_tokens=6, temperature=0.5, stop=("END",))
    rows = [{}, {"temperature": 0}, {"top_p": 0.5, "n": 3}, {"stop": "x"}, {"stop": ["a", "b"], "max_tokens": 2}, None]
    job = job_of(model, json_lines(tmp_path / "in.jsonl", *rows), sampling=base, n=2)
    assert sampled(job) == {
        0: (base, 2),
        1: (replace(base, temperature=0.0), 2),
        2: (replace(base, top_p=0.5), 3),
        3: (replace(base, stop=("x",)), 2),
        4: (replace(base, stop=("a", "b"), max_tokens=2), 2),
        5: (base, 2),
    }


def test_structs_of_parquet_are_read_as_objects_are(model: Path, tmp_path: Path) -> None:
    rows = [{"temperature": 0.7, "stop": ["x"]}, {"temperature": None, "stop": None}, None, {"temperature": 1.0}]
    kind = pa.struct([("temperature", pa.float64()), ("stop", pa.list_(pa.string()))])
    table = pa.table({"prompt": prompts(4), COLUMN: pa.array(rows, kind)})
    pq.write_table(table, tmp_path / "in.parquet")
    base = SamplingParams(max_tokens=6)
    found = sampled(job_of(model, tmp_path / "in.parquet"))
    assert [params for params, _ in found.values()] == [
        replace(base, temperature=0.7, stop=("x",)), base, base, replace(base, temperature=1.0)
    ]  # fmt: skip


WRONG = {
    '{"temperature": -1}': "temperature is -1; it must be from 0 to 100",
    '{"top_p": 2}': "top_p is 2; it must be above 0 and at most 1 (off)",
    '{"max_tokens": 2.5}': "max_tokens is 2.5; it must be a whole number",
    '{"temprature": 1}': "'temprature' is no sampling param; there are max_tokens",
    '{"n": 0}': "n is 0; it must be from 1 to 128",
    '{"n": true}': "n is True; it must be a whole number",
    '{"seed": -4}': "seed is -4; it must be 0 or more",
    '{"stop": [1]}': "it must be a list of strings",
    '{"stop": 5}': "it must be a list of strings",
    '{"stop": [""]}': "stop is an empty string",
    '{"min_tokens": 9}': "min_tokens is 9; it must be at most max_tokens, 6",
    '{"stop_token_ids": [999]}': "stop_token_ids is 999; it must be at most",
    '{"regex": "a", "json_schema": {"type": "object"}}': "json_schema is given, and regex too",
    '{"regex": "("}': "regex ",
    '{"json_schema": {"type": "object", "unevaluatedProperties": false}}': "json_schema ",
    '{"max_thinking_tokens": 5}': "no tags are known to close it by",
    '{"thinking_tags": [1, 2]}': "'thinking_tags' is no sampling param",
    "[1]": "the sampling_params are no object",
    '"text"': "the sampling_params are no object",
    "{": "the sampling_params are not JSON",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_the_rows_error(model: Path, tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "in.parquet", prompt=prompts(3), sampling_params=["{}", text, '{"max_tokens": 2}'])
    found = preflight(job_of(model, path))
    requests, errors = found.source.tokenize(0, next(found.table.batches(found.source.columns, 1000))[1])
    assert requests.rows.tolist() == [0, 2] and list(errors) == [1]
    assert errors[1].code == "bad_sampling_params" and WRONG[text] in errors[1].message


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (pa.int64(), "is int64; expected structs"),
        (
            pa.struct([("temperature", pa.float64()), ("topp", pa.float64())]),
            "has a field 'topp', which is no",
        ),
        (pa.struct([("json_schema", pa.struct([("type", pa.string())]))]), "expected JSON schemas as text"),
    ],
)
def test_a_column_that_cannot_hold_params_is_refused(model: Path, tmp_path: Path, kind: pa.DataType, said: str) -> None:
    pq.write_table(pa.table({"prompt": ["a"], COLUMN: pa.nulls(1, kind)}), tmp_path / "in.parquet")
    with pytest.raises(Refused, match=said):
        preflight(job_of(model, tmp_path / "in.parquet"))


def test_labels_are_not_sampled(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--sampling-params-column is for answers that are generated"):
        job_of(model, tmp_path / "in.jsonl", choices=("a", "b"))


def test_seeds_are_the_rows_own(model: Path, tmp_path: Path) -> None:
    """A row with seed S draws as a job with --seed S does."""

    def seeds(path: Path, **fields: Any) -> list[int]:
        found = preflight(job_of(model, path, sampling=SamplingParams(temperature=1.0), **fields))
        return found.source.tokenize(0, next(found.table.batches(found.source.columns, 9))[1])[0].seeds.tolist()

    own = seeds(json_lines(tmp_path / "own.jsonl", {"seed": 5}, {}, {"seed": 7}), seed=3)
    plain = json_lines(tmp_path / "plain.jsonl", {}, {}, {})
    assert own == [seeds(plain, seed=seed)[row] for row, seed in enumerate((5, 3, 7))]


def test_each_row_has_the_samples_that_it_asks_for(model: Path, tmp_path: Path) -> None:
    rows = [{"n": n, "temperature": t} for n, t in ((1, 0.9), (3, 0.9), (2, 0.0), (128, 0.9))]
    path = json_lines(tmp_path / "in.jsonl", *rows, {"n": 129})
    report = run(job_of(model, path, sampling=SamplingParams(max_tokens=4)), STUB)
    table = pq.read_table(tmp_path / "out.parquet")
    assert pa.compute.list_value_length(table["samples"]).to_pylist() == [1, 3, 2, 128, None]
    assert report.completion_tokens == 4 * (1 + 3 + 2 + 128)


def test_texts_end_at_each_rows_own_stop(model: Path, tmp_path: Path) -> None:
    """The stub answers with its prompt."""
    rows = [{"stop": ["l"]}, {"stop": "o"}, {}, {"stop": ["0", "3"]}]
    path = json_lines(tmp_path / "in.jsonl", *rows)
    run(job_of(model, path, sampling=SamplingParams(max_tokens=40)), STUB)
    texts = pq.read_table(tmp_path / "out.parquet")["generated_text"].to_pylist()
    assert texts == ["he", "hell", "hello 2", "hello "]


def test_rows_that_ask_for_the_same_are_computed_once(model: Path, tmp_path: Path) -> None:
    same = {"temperature": 0.5, "top_k": 3}
    rows = [same, {"temperature": 0.5}, same, {"top_k": 3, "temperature": 0.5}, {**same, "n": 2}, {**same, "seed": 1}]
    path = write_json_lines(tmp_path / "in.jsonl", *({"prompt": "hello", COLUMN: row} for row in rows))
    assert run(job_of(model, path), STUB).rows_duplicate == 2


def test_another_column_is_another_job(model: Path, tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", {"prompt": "a", COLUMN: {}, "other": {}})
    run(job_of(model, path), STUB)
    with pytest.raises(Refused, match="begun with another sampling"):
        run(job_of(model, path, sampling_params_column="other"), STUB)


def test_the_plan_takes_the_mean_of_max_tokens(model: Path, tmp_path: Path) -> None:
    path = json_lines(tmp_path / "in.jsonl", *({"max_tokens": n, "ignore_eos": True} for n in (2, 4, 6, 8)))
    outlook = plan(job_of(model, path, sampling=SamplingParams(max_tokens=300)))
    assert outlook.most_new_tokens == 4 * 5
    assert any("mean of the rows' max_tokens" in note for note in outlook.notes)


def test_a_million_values_need_no_object_each(model: Path, tmp_path: Path) -> None:
    found = preflight(job_of(model, json_lines(tmp_path / "in.jsonl", {})))
    texts = [json.dumps({"temperature": i / 1000}) for i in range(1000)]
    batch = pa.record_batch({"prompt": ["hi"] * 1000, COLUMN: texts})
    requests, _ = found.source.tokenize(0, batch)
    assert np.allclose(requests.number("temperature"), np.arange(1000) / 1000)
    assert len(requests.params.others) == 1
