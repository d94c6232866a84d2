"""Whole jobs with --reorder-fields: the stub engine answers with the prompt, which shows the order of its lines."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import call
from stub_jobs import STUB, make_model, spec, write

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused, UsageError
from batchinfer.jobs import field_reordering
from batchinfer.jobs.incremental import run_new_rows
from batchinfer.jobs.job import run
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.report import Report
from batchinfer.jobs.rows import field_values
from batchinfer.jobs.spec import JobSpec, sharded

TEMPLATE = "Look:\nText: {text}\nKind: {kind}\nMaker: {maker}\nAnswer:"
BETTER = "Look:\nKind: {kind}\nMaker: {maker}\nText: {text}\nAnswer:"
ROWS = 12
COLUMNS: dict[str, list[Any]] = {
    "id": list(range(ROWS)),
    "text": [f"{i}th words" for i in range(ROWS)],
    "kind": [["tool", "toy"][i % 2] for i in range(ROWS)],
    "maker": [["Ann", "Bob", "Cyd", "Dee"][i % 4] for i in range(ROWS)],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


def job(model: Path, path: Path, **fields: Any) -> JobSpec:
    defaults = {
        "prompt_column": None, "prompt_template": TEMPLATE, "reorder_fields": True,
        "sampling": SamplingParams(max_tokens=200),
    }  # fmt: skip
    return spec(model, path, **{**defaults, **fields})


def table(folder: Path, columns: dict[str, Any] | None = None, name: str = "in.parquet") -> Path:
    return write(folder / name, **(columns or COLUMNS))


def prompts(template: str, columns: dict[str, list[Any]] | None = None) -> list[str]:
    columns = columns or COLUMNS
    return [template.format(**{name: values[i] for name, values in columns.items()}) for i in range(len(columns["id"]))]


def answers(path: Path) -> list[str | None]:
    found: list[str | None] = pq.read_table(path)["generated_text"].to_pylist()
    return found


def note_of(report: Report) -> str:
    (note,) = [note for note in report.notes if "--reorder-fields" in note]
    return note


def template_of(output: Path) -> str:
    (path,) = output.parent.rglob(f"{output.stem}.run/run.json")
    found = json.loads(path.read_text())["spec"]
    assert found["reorder_fields"] is True
    return str(found["prompt_template"])


def test_prompts_are_those_of_the_reordered_template(tmp_path: Path, model: Path) -> None:
    report = run(job(model, table(tmp_path)), STUB)
    assert answers(tmp_path / "out.parquet") == prompts(BETTER)
    assert template_of(tmp_path / "out.parquet") == BETTER
    assert "this order: kind, maker, text; about " in note_of(report)


def test_it_resumes_as_the_job_of_the_same_template(tmp_path: Path, model: Path) -> None:
    """Also if other rows would have another order by now, or another version finds one: what was begun counts."""
    given = job(model, table(tmp_path), commit_rows=4)
    run(given, STUB)
    sorted((tmp_path / "out.run" / "parts").iterdir())[-1].unlink()
    (tmp_path / "out.parquet").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(field_reordering, "best_order", lambda lines, *_: list(range(len(lines))))
        resumed = run(given, STUB)
    assert resumed.rows_resumed < ROWS and answers(tmp_path / "out.parquet") == prompts(BETTER)
    assert note_of(resumed) == "--reorder-fields: the order is as the job began: kind, maker, text"
    for other in ({"reorder_fields": False}, {"prompt_template": TEMPLATE.replace("Look", "See")}):
        with pytest.raises(Refused, match="begun with another template,"):
            run(job(model, table(tmp_path), **other), STUB)
    same = run(job(model, table(tmp_path), reorder_fields=False, prompt_template=BETTER), STUB)
    assert same.rows == ROWS


def test_all_shards_take_the_order_of_the_whole_table(tmp_path: Path, model: Path) -> None:
    """Take a first shard that alone would keep the template, because all of its texts are equal."""
    columns = {**COLUMNS, "text": ["same"] * 6 + COLUMNS["text"][6:], "kind": ["tool", "toy"] * 3 + ["toy"] * 6}
    path = table(tmp_path, columns)
    alone = run(job(model, table(tmp_path, {k: v[:6] for k, v in columns.items()}, "first.parquet")), STUB)
    assert "keeps --prompt-template" in note_of(alone) and template_of(tmp_path / "out.parquet") == TEMPLATE
    out = tmp_path / "o.parquet"
    for shard in range(2):
        run(job(model, path, shard=(shard, 2), output=sharded(out, shard, 2)), STUB)
        assert template_of(sharded(out, shard, 2)) == BETTER
    merge_shards([sharded(out, shard, 2) for shard in range(2)], out, False)
    assert answers(out) == prompts(BETTER, columns)


def test_a_growing_table_keeps_the_order_of_its_first_rows(tmp_path: Path, model: Path) -> None:
    """Further rows would have the text first, which is the same in all of them."""
    path = table(tmp_path)
    given = job(model, path, incremental=True, id_column="id", output=tmp_path / "out")
    assert "this order: kind, maker, text" in note_of_first(given)
    more = {
        "id": list(range(300)),
        "text": COLUMNS["text"] + ["the same long text"] * 288,
        "kind": COLUMNS["kind"] + [f"kind {i}" for i in range(288)],
        "maker": COLUMNS["maker"] + [f"maker {i}" for i in range(288)],
    }
    table(tmp_path, more)
    report = run_new_rows(given, lambda part: run(part, STUB))
    assert report.rows == 288
    assert "the first run: kind, maker, text" in note_of(report)
    assert answers(tmp_path / "out" / "part-000002.parquet") == prompts(BETTER, more)[ROWS:]
    assert run(job(model, path, output=tmp_path / "o.parquet"), STUB).notes != report.notes
    assert template_of(tmp_path / "o.parquet") != BETTER
    with pytest.raises(Refused, match="begun with another template,"):
        run_new_rows(
            job(model, path, incremental=True, id_column="id", output=tmp_path / "out", reorder_fields=False),
            lambda part: run(part, STUB),
        )


def note_of_first(given: JobSpec) -> str:
    notes: list[str] = []
    run_new_rows(given, lambda part: _noted(run(part, STUB), notes))
    found = json.loads((given.output.parent / "out.run" / "growth.json").read_text())["prompt_template"]
    assert found == BETTER
    return "this order: " + notes[0].rpartition(": ")[2]


def _noted(report: Report, notes: list[str]) -> Report:
    notes.append(note_of(report))
    return report


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("Classify {text} by {kind}", "changes nothing: only whole lines with fields change places"),
        ("{text}\nof\n{kind}", "changes nothing: only whole lines with fields change places"),
        (BETTER, "keeps --prompt-template as it is: no other order of its fields shares 2% more of the prompts"),
    ],
)
def test_a_template_that_stays_as_it_is_is_said_to(tmp_path: Path, model: Path, template: str, said: str) -> None:
    report = run(job(model, table(tmp_path), prompt_template=template), STUB)
    assert said in note_of(report)
    assert answers(tmp_path / "out.parquet") == prompts(template)


def test_rows_with_nulls_fail_and_do_not_count(tmp_path: Path, model: Path) -> None:
    columns = {**COLUMNS, "text": [*COLUMNS["text"][:-2], None, None]}
    report = run(job(model, table(tmp_path, columns)), STUB)
    assert (report.rows_ok, report.rows_by_error) == (ROWS - 2, {"null_prompt": 2})
    assert template_of(tmp_path / "out.parquet") == BETTER
    nothing = table(tmp_path, {**COLUMNS, "text": pa.nulls(ROWS, pa.string())}, "nothing.parquet")
    report = run(job(model, nothing, output=tmp_path / "o.parquet"), STUB)
    assert report.rows_ok == 0 and "keeps --prompt-template" in note_of(report)


def test_a_large_table_is_said_to_be_looked_at_in_part(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(field_values, "MOST_ROWS", 5)
    columns = {name: values * 4 for name, values in COLUMNS.items()}
    columns["id"] = columns["text"] = list(range(4 * ROWS))
    assert "(by every 10th row)" in note_of(run(job(model, table(tmp_path, columns)), STUB))


def test_it_needs_a_template_and_its_columns(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path)
    with pytest.raises(UsageError, match="--reorder-fields orders the lines of --prompt-template, and prompts come"):
        job(model, path, prompt_template=None, prompt_column="text")
    with pytest.raises(UsageError, match="--reorder-fields is about a table"):
        job(model, path, prompt_template=None, openai_batch=True)
    with pytest.raises(Refused, match=r"in.parquet has no column 'gone'"):
        run(job(model, path, prompt_template="{gone}\n{text}"), STUB)
    lists = table(tmp_path, {**COLUMNS, "kind": [["a"]] * ROWS}, "lists.parquet")
    with pytest.raises(Refused, match="column 'kind' is list"):
        run(job(model, lists), STUB)
    code, said = call(capsys, "run", path, "-o", tmp_path / "x.parquet", "--model", model, "--reorder-fields")
    assert code == 2 and "prompts come from --prompt-column" in said
