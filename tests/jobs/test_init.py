"""`batchinfer init` on five kinds of tables: each job file is read again as the job that it describes, and planned."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import call
from stub_jobs import make_model

from batchinfer.jobs import local_models
from batchinfer.jobs.cli.main import main
from batchinfer.jobs.cli.run import job_of
from batchinfer.jobs.spec import JobSpec

REVIEWS = "id,label,review\n" + "".join(f"{i},good,Review number {i} of a thing\n" for i in range(30))
CHATS = [{"messages": [{"role": "user", "content": f"Question {i}?"}]} for i in range(5)]
REQUESTS = [
    {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": f"p {i}"}}
    for i in range(3)
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a chat model in `model`, and nothing in the Hub's cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local_models, "_in_cache", lambda: iter(()))
    (tmp_path / "model").mkdir()
    model = make_model(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return tmp_path


def job(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[JobSpec, str]:
    """The job that the written file describes, and the file."""
    assert call(capsys, "init", *arguments) == (0, "")
    return job_of(["--config", "job.toml"]), Path("job.toml").read_text("utf-8")


def test_a_table_of_reviews(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "reviews.csv").write_text(REVIEWS)
    spec, text = job(capsys, "reviews.csv")
    assert (spec.prompt_template, spec.id_column, spec.chat) == ("{review}", "id", True)
    assert Path(spec.model).resolve() == here / "model" and spec.output.resolve() == here / "reviews-answers.parquet"
    assert "30 rows in 1 file." in text and "Further columns of text: {label}." in text
    assert "# 30 rows can run; prompts have " in text


def test_chats(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    spec, text = job(capsys, "chats.jsonl")
    assert spec.messages_column == "messages" and not spec.chat and "# 5 rows can run" in text


def test_documents_with_nulls(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"title": ["a", "b", "c"], "document": ["one two", None, "three"]}), here / "d.parquet")
    spec, text = job(capsys, "d.parquet")
    assert spec.prompt_template == "{document}"
    assert "document is null in 1 of the first 3 rows" in text
    assert "# 1 row will fail with null_prompt, first row 1:" in text
    where = next(line.partition("where = ")[2] for line in text.splitlines() if "where = " in line)
    assert job_of(["--config", "job.toml", "--where", json.loads(where)]).where == "document is not None"


def test_a_folder_of_shards(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "shards").mkdir()
    for i in range(3):
        pq.write_table(pa.table({"prompt": [f"prompt {i} {j}" for j in range(4)]}), here / "shards" / f"{i}.parquet")
    spec, text = job(capsys, "shards")
    assert spec.prompt_column == "prompt" and "12 rows in 3 files." in text
    assert spec.output.resolve() == here / "shards-answers.parquet", "a job file for each table, an output for each"


def test_a_batch_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "batch.jsonl").write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
    spec, text = job(capsys, "batch.jsonl")
    assert spec.openai_batch and spec.any_model and spec.output.resolve() == here / "batch-responses.jsonl"
    assert "# 3 rows can run" in text


def test_chats_get_a_model_with_a_chat_template(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "small").mkdir()
    (make_model(here / "small") / "model.safetensors").write_bytes(b"few")
    (here / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    spec, text = job(capsys, "chats.jsonl")
    assert Path(spec.model).resolve() == here / "model" and '# model = "small"' in text


def test_a_job_file_that_cannot_be_planned_says_so_at_once(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "model" / "chat_template.jinja").unlink()
    (here / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    monkeypatch.setattr("sys.argv", ["batchinfer", "init", "chats.jsonl"])
    with pytest.raises(SystemExit):
        main()
    assert "job.toml is written. No plan can be made yet: model has no chat template" in capsys.readouterr().out


def test_a_condition_names_no_column_that_it_cannot(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"my document": ["one two", None, "three"]}), here / "d.parquet")
    spec, text = job(capsys, "d.parquet")
    assert spec.prompt_template == "{my document}" and "is null in 1" in text and "where" not in text


def test_a_model_that_only_continues_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "model" / "chat_template.jinja").unlink()
    (here / "reviews.csv").write_text(REVIEWS)
    assert not job(capsys, "reviews.csv")[0].chat


def test_without_a_model_the_file_says_where_to_name_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "model" / "model.safetensors").unlink()
    (here / "reviews.csv").write_text(REVIEWS)
    assert call(capsys, "init", "reviews.csv") == (0, "")
    text = Path("job.toml").read_text("utf-8")
    assert "No model was found here" in text and "can run" not in text
    code, said = call(capsys, "run", "--config", "job.toml")
    assert code == 2 and "--model is missing; give it" in said


def test_a_file_in_another_folder_has_paths_from_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "reviews.csv").write_text(REVIEWS)
    (here / "jobs").mkdir()
    assert call(capsys, "init", "reviews.csv", "-o", "jobs/a.toml")[0] == 0
    spec = job_of(["--config", "jobs/a.toml"])
    assert Path(spec.model).resolve() == here / "model" and spec.inputs[0].resolve() == here / "reviews.csv"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["none.csv"], 65, "none.csv"),
        (["reviews.csv", "-o", "job.yaml"], 2, "--output is job.yaml; a job file's name must end in .toml"),
        (["reviews.csv", "-o", "old.toml"], 65, "old.toml exists; give --overwrite to replace it"),
        (["picture.png"], 65, "picture.png"),
    ],
)
def test_what_cannot_be_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[Any], code: int, said: str
) -> None:
    (here / "reviews.csv").write_text(REVIEWS)
    (here / "old.toml").write_text("x")
    (here / "picture.png").write_bytes(b"\x89PNG")
    found, error = call(capsys, "init", *arguments)
    assert found == code and said in error and (here / "old.toml").read_text() == "x"
    assert not (here / "job.toml").exists()


@pytest.mark.parametrize("name", ['a "b" \\ c', "naïve 表", "{x}"])
def test_odd_names_are_written_as_they_are(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"]}), here / f"{name}.parquet")
    spec, _ = job(capsys, f"{name}.parquet")
    assert spec.inputs[0].name == f"{name}.parquet"
