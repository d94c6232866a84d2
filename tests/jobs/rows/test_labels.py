"""Jobs whose rows choose from labels: the columns are what transformers computes, for labels of all rows or of each."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from chat_models import chat_model
from command_line import call
from whole_jobs import assert_parts_make_the_whole

from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.job import run
from batchinfer.jobs.outlook import plan
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.verify import verify

TEXTS = ["Hello", "the user and the assistant", "日本語", "a model of the system " * 9, "Hello", "x", "the end"]
LABELS = ("yes", "no", "not at all", "not yet", "yes, but")


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(make_model, tmp_path_factory.mktemp("models"))


def job(model: Path, folder: Path, **fields: Any) -> JobSpec:
    given = {"inputs": (folder / "in.parquet",), "output": folder / "out.parquet", "prompt_column": "prompt"}
    return JobSpec(**{**given, "model": str(model), "device": "cpu", **fields})


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


class Oracle:
    """Probabilities of labels by transformers: of the whole text's tokens behind those of the prompt, then an end."""

    def __init__(self, model: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.end = self.tokenizer.eos_token_id

    def score(self, prompt: str, label: str, rendered: bool = False) -> float:
        texts = (prompt, prompt + label)
        before, whole = (self.tokenizer(text, add_special_tokens=not rendered).input_ids for text in texts)
        assert whole[: len(before)] == before and len(whole) > len(before)
        with torch.no_grad():
            known = torch.log_softmax(self.model(torch.tensor([whole])).logits[0, len(before) - 1 :], -1)
        answer = [*whole[len(before) :], self.end]
        return float(known[range(len(answer)), answer].sum())

    def chat(self, text: str) -> str:
        messages = [{"role": "user", "content": text}]
        rendered: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return rendered


def assert_choice(row: dict[str, Any], scores: dict[str, float]) -> None:
    mass = sum(map(math.exp, scores.values()))
    best = max(scores, key=scores.__getitem__)
    assert (row["choice"], row["generated_text"], row["finish_reason"]) == (best, best, "stop")
    assert math.log(row["choice_probability"]) == pytest.approx(scores[best] - math.log(mass), abs=1e-4)
    assert math.log(row["choice_mass"]) == pytest.approx(math.log(mass), abs=1e-4)


def test_labels_of_all_rows(model: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": TEXTS, "id": range(len(TEXTS))}), tmp_path / "in.parquet")
    fields: dict[str, Any] = {"chat": True, "choices": LABELS, "choice_probabilities": True, "dtype": "float32"}
    report = run(job(model, tmp_path, **fields))
    assert (report.rows_ok, report.rows_duplicate) == (len(TEXTS), 1)
    oracle = Oracle(model)
    found = rows_of(tmp_path / "out.parquet")
    for text, row in zip(TEXTS, found, strict=True):
        scores = {label: oracle.score(oracle.chat(text), label, rendered=True) for label in LABELS}
        assert_choice(row, scores)
        assert list(row["choice_probabilities"]) == list(LABELS)
        assert sum(row["choice_probabilities"].values()) == pytest.approx(1)
        assert row["choice_probabilities"][row["choice"]] == row["choice_probability"]
    verify(tmp_path / "out.parquet")
    assert_parts_make_the_whole(partial(job, model, tmp_path, **fields), tmp_path / "out.parquet")


def test_labels_of_each_row(model: Path, tmp_path: Path) -> None:
    table = {
        "prompt": ["It is", "It is", "It is", "It is", "", "It is", "It is", "It is", "x" * 3000],
        "options": [[" a", " the"], [" the", " a"], [" a", " the"], [" model"], [" a"], None, [], [" a", " a"], [" a"]],
    }
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    output = tmp_path / "out.jsonl"
    fields: dict[str, Any] = {"choices_column": "options", "choice_probabilities": True, "dtype": "float32"}
    report = run(job(model, tmp_path, output=output, **fields))
    assert report.rows_duplicate == 1, "only rows with the same labels in the same order are duplicates"
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    oracle = Oracle(model)
    for row in rows[:4]:
        assert_choice(row, {label: oracle.score("It is", label) for label in row["options"]})
        assert [pair["label"] for pair in row["choice_probabilities"]] == row["options"]
    assert rows[0]["choice"] == rows[1]["choice"] and rows[3]["choice_probability"] == 1
    codes = [row["error_code"] for row in rows]
    assert codes == [None] * 4 + ["empty_prompt", "bad_labels", "bad_labels", "bad_labels", "too_long"]
    assert all(row["choice"] is row["choice_mass"] is row["choice_probabilities"] is None for row in rows[4:])


def test_a_column_that_holds_no_labels_is_refused(model: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "options": ["yes"]}), tmp_path / "in.parquet")
    with pytest.raises(Refused, match="column 'options' is string; expected lists of texts"):
        run(job(model, tmp_path, choices_column="options"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--choices", "yes,"], "--choices has an empty label"),
        (["--choices", "yes,no,yes"], "--choices has 'yes' twice"),
        (["--choices", '["yes"'], "is no JSON list"),
        (["--choices", "[1, 2]"], "not all texts"),
        (["--choices", "a,b", "--choices-column", "c"], "leave one of them out"),
        (["--choice-probabilities"], "needs --choices or --choices-column"),
        (["--choices", "a,b", "--temperature", "1"], "--temperature is for answers that are generated"),
        (["--choices", "a,b", "--max-tokens", "3"], "--max-tokens is for answers that are generated"),
        (["--choices", "a,b", "--draft-model", "m"], "--draft-model is for answers that are generated"),
        (["--choices", "a,b", "--n", "2"], "--n is for answers that are generated"),
        (["--choices", "a,b", "--max-num-seqs", "1"], "there are 2 labels; there must be at most 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "c": [["a"]]}), tmp_path / "in.parquet")
    command = ["run", tmp_path / "in.parquet", "-o", tmp_path / "out.parquet", "--model", model]
    code, error = call(capsys, *command, *flags)
    assert code == 2 and said in error
    assert not (tmp_path / "out.run").exists()


def test_labels_written_as_json_keep_spaces_and_commas(model: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["It is"]}), tmp_path / "in.parquet")
    labels = (" yes, it is", " no")
    run(job(model, tmp_path, choices=labels, dtype="float32"))
    oracle = Oracle(model)
    assert_choice(rows_of(tmp_path / "out.parquet")[0], {label: oracle.score("It is", label) for label in labels})


def test_a_job_with_other_labels_is_another_job(model: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["It is"]}), tmp_path / "in.parquet")
    run(job(model, tmp_path, choices=("a", "b")))
    with pytest.raises(Refused, match="sampling"):
        run(job(model, tmp_path, choices=("b", "a")))


def test_a_plan_counts_the_tokens_of_labels(model: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["It is", "x"]}), tmp_path / "in.parquet")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    labels = (" a", " the end")
    expected = 2 * sum(len(tokenizer(label, add_special_tokens=False).input_ids) for label in labels)
    notes = plan(job(model, tmp_path, choices=labels)).notes
    assert [note for note in notes if f"leave out the labels, which have {expected} tokens" in note]


def test_usage_errors_name_the_flags() -> None:
    with pytest.raises(UsageError, match="--canary is for answers that are generated"):
        JobSpec((Path("a.parquet"),), Path("b.parquet"), "m", prompt_column="p", choices=("a", "b"), canary=3)


def test_the_sum_over_labels_is_a_probability(model: Path, tmp_path: Path) -> None:
    """Single tokens, all of them: their masses and those of longer answers add up to less than 1."""
    words = np.unique([chr(c) for c in range(ord("a"), ord("z") + 1)]).tolist()
    pq.write_table(pa.table({"prompt": ["It is "]}), tmp_path / "in.parquet")
    run(job(model, tmp_path, choices=tuple(words), max_num_seqs=32))
    assert 0 < rows_of(tmp_path / "out.parquet")[0]["choice_mass"] < 1
