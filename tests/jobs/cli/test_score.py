"""Whole jobs with log-probabilities: `score`, and the columns of `run`, by transformers, and through all machinery."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from chat_models import chat_model
from numpy.typing import NDArray
from whole_jobs import assert_parts_make_the_whole

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import UsageError
from batchinfer.jobs.cli.score import score_job
from batchinfer.jobs.job import run
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.verify import verify

STEM = "a model of the system and the user " * 9  # more than a tile
ROWS = [
    (STEM + "says:", " Hello"),
    (STEM + "says:", " the assistant, and more of it"),
    (STEM + "is", " model"),
    ("Hello", " 日本語"),
    ("Hello", " there"),
    ("Hello", " there"),
    ("Hello", ""),
    ("Hello", None),
    (None, "x"),
    ("Hello", "too long " * 200),
    ("", "x"),
    ("system", " user" * 30),
]
CODES = {6: "empty_completion", 7: "null_completion", 8: "null_prompt", 9: "too_long", 10: "empty_prompt"}


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(make_model, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def logprobs_of(folder: Path) -> Callable[[str, str], tuple[list[int], NDArray[np.float64], bool]]:
    """The tokens of a text behind another one, their log-probabilities, and whether each is the likeliest."""
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def find(before: str, text: str) -> tuple[list[int], NDArray[np.float64], bool]:
        first, ids = len(tokenizer(before)["input_ids"]), tokenizer(before + text)["input_ids"]
        assert ids[:first] == tokenizer(before)["input_ids"]
        with torch.no_grad():
            found = torch.log_softmax(oracle(torch.tensor([ids])).logits[0, first - 1 : -1].double(), -1).numpy()
        own = found[np.arange(len(ids) - first), ids[first:]]
        return ids[first:], own, bool((own == found.max(-1)).all())

    return find


@pytest.fixture(scope="module")
def scored(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., JobSpec]:
    """A job that has run, of the completions in `ROWS`."""
    there = tmp_path_factory.mktemp("job")
    prompts, completions = zip(*ROWS, strict=True)
    pq.write_table(pa.table({"prompt": pa.array(prompts), "completion": pa.array(completions)}), there / "in.parquet")

    def job(**fields: Any) -> JobSpec:
        given = {"inputs": (there / "in.parquet",), "output": there / "out.parquet", "model": str(folder)}
        given |= {"prompt_column": "prompt", "completion_column": "completion", "token_log_probabilities": True}
        given |= {"max_model_len": 200, "commit_rows": 4}
        return score_job(**given | fields)

    report = run(job())
    assert report.rows_failed == len(CODES) and report.rows_duplicate == 1 and report.prompt_tokens_shared >= 64
    return job


def test_scores_of_completions_are_those_of_transformers(scored: Callable[..., JobSpec], logprobs_of: Any) -> None:
    table = pq.read_table(scored().output)
    assert "generated_text" not in table.schema.names
    for i, row in enumerate(table.to_pylist()):
        if i in CODES:
            assert (row["error_code"], row["log_probability"], row["greedy"]) == (CODES[i], None, None)
            assert row["token_log_probabilities"] is None
            continue
        ids, values, greedy = logprobs_of(*ROWS[i])
        text = ROWS[i][1] or ""
        assert row["completion_tokens"] == len(ids) and row["finish_reason"] == "stop" and row["greedy"] == greedy
        assert row["log_probability"] == pytest.approx(values.sum(), abs=1e-4 * len(ids))
        assert row["log_probability_per_token"] == pytest.approx(values.mean(), abs=1e-4)
        assert row["log_probability_per_byte"] == pytest.approx(values.sum() / len(text.encode()), abs=1e-4)
        found = row["token_log_probabilities"]
        assert [token["token_id"] for token in found] == ids
        np.testing.assert_allclose([token["logprob"] for token in found], values, atol=1e-4)
        together = "".join(token["token"] for token in found)
        assert together == text or "\ufffd" in together
    assert "12 rows (5 error, 7 stop)" in verify(scored().output)[0]


def test_shards_and_resumed_jobs_come_to_the_same(scored: Callable[..., JobSpec], tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"

    def job(**fields: Any) -> JobSpec:
        return scored(**{"output": output, **fields})

    run(job())
    assert pq.read_table(output).equals(pq.read_table(scored().output))
    assert_parts_make_the_whole(job, output)


def test_answers_of_an_earlier_job_are_taken(scored: Callable[..., JobSpec], tmp_path: Path) -> None:
    again = scored(output=tmp_path / "again.parquet", reuse=(scored().output,))
    assert run(again).rows_reused == len(ROWS) - len(CODES)
    assert pq.read_table(again.output).equals(pq.read_table(scored().output))


def test_equal_tokens_that_are_cut_elsewhere_are_no_duplicates(folder: Path, tmp_path: Path, logprobs_of: Any) -> None:
    rows = [("Hello", " there there"), ("Hello there", " there")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"p": p, "c": c}) + "\n" for p, c in rows))
    job = score_job(
        inputs=(tmp_path / "in.jsonl",), output=tmp_path / "out.jsonl", model=str(folder), prompt_column="p",
        completion_column="c",
    )  # fmt: skip
    assert run(job).rows_duplicate == 0
    for line, (prompt, completion) in zip((tmp_path / "out.jsonl").read_text().splitlines(), rows, strict=True):
        expected = logprobs_of(prompt, completion)[1].sum()
        assert json.loads(line)["log_probability"] == pytest.approx(expected, abs=1e-4)


def test_the_perplexity_of_texts_is_that_of_transformers(folder: Path, tmp_path: Path, logprobs_of: Any) -> None:
    texts = ["Hello there", STEM, "日本語", ""]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    output = tmp_path / "out.parquet"
    run(score_job(inputs=(tmp_path / "in.jsonl",), output=output, model=str(folder), text_column="text"))
    *good, empty = pq.read_table(output).to_pylist()
    assert empty["error_code"] == "empty_prompt" and empty["perplexity"] is None
    for row in good:
        ids, values, _ = logprobs_of("", row["text"])
        assert row["completion_tokens"] == len(ids)
        assert row["perplexity"] == pytest.approx(np.exp(-values.mean()), rel=1e-4)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_answers_and_samples_have_the_log_probabilities_of_their_tokens(
    folder: Path, tmp_path: Path, suffix: str
) -> None:
    prompts = [STEM, STEM + "x", "Hello", "Hello", ""]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    sampling = SamplingParams(max_tokens=6, temperature=0.8, logprobs=2, prompt_logprobs=0)
    output = tmp_path / f"out.{suffix}"
    job = JobSpec(inputs=(tmp_path / "in.jsonl",), output=output, model=str(folder), prompt_column="prompt",
                  sampling=sampling, n=2)  # fmt: skip
    report = run(job)
    assert report.rows_failed == 1 and report.rows_duplicate == 1
    lines = output.read_text().splitlines() if suffix == "jsonl" else []
    rows = [json.loads(line) for line in lines] or pq.read_table(output).to_pylist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert [rows[4][name] for name in ("logprobs", "prompt_logprobs", "samples")] == [None] * 3
    assert rows[2]["samples"] == rows[3]["samples"] and rows[0]["logprobs"] == rows[0]["samples"][0]["logprobs"]
    for row in rows[:4]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        assert [token["token_id"] for token in row["prompt_logprobs"]] == prompt[1:]
        assert set(row["prompt_logprobs"][0]) == {"token", "token_id", "logprob"}
        for sample in row["samples"]:
            ids = [token["token_id"] for token in sample["logprobs"]]
            assert len(ids) == sample["completion_tokens"]
            with torch.no_grad():
                found = torch.log_softmax(oracle(torch.tensor([prompt + ids])).logits[0], -1).numpy()
            expected = found[np.arange(len(prompt) + len(ids) - 1), [*prompt[1:], *ids]]
            both = [*row["prompt_logprobs"], *sample["logprobs"]]
            np.testing.assert_allclose([token["logprob"] for token in both], expected, atol=1e-4)
            for token, place in zip(sample["logprobs"], found[len(prompt) - 1 :], strict=False):
                top = [each["logprob"] for each in token["top"]]
                np.testing.assert_allclose(top, -np.sort(-place)[:2], atol=1e-4)
    verify(output)


def test_rows_with_params_of_their_own_ask_for_fewer(folder: Path, tmp_path: Path) -> None:
    asked = [{}, {"logprobs": 1}, {"logprobs": -1}, {"logprobs": 3}, {"prompt_logprobs": 0}]
    rows = [{"prompt": "Hello", "params": json.dumps(params)} for params in asked]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.parquet"
    run(JobSpec(inputs=(tmp_path / "in.jsonl",), output=output, model=str(folder), prompt_column="prompt",
                sampling_params_column="params", sampling=SamplingParams(max_tokens=3, logprobs=2)))  # fmt: skip
    found = pq.read_table(output).to_pylist()
    counts = [None if row["logprobs"] is None else {len(token["top"]) for token in row["logprobs"]} for row in found]
    assert counts == [{2}, {1}, None, None, None]
    assert [row["error_code"] for row in found] == [None, None, None, *["bad_sampling_params"] * 2]
    assert "logprobs is 3; it must be at most that of --logprobs, which is 2" in found[3]["error_message"]


def test_a_job_that_was_killed_goes_on(scored: Callable[..., JobSpec], folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{STEM}{n}", "completion": f" {n} times the user"} for n in range(60)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "batchinfer", "score", "in.jsonl", "--model", str(folder)]
    command += ["--completion-column", "completion", "--commit-rows", "4", "--max-num-seqs", "2", "-o"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "whole.parquet"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    with subprocess.Popen([*command, "out.parquet"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as job:
        parts = tmp_path / "out.run" / "parts"
        while job.poll() is None and len(list(parts.glob("part-*"))) < 2:
            time.sleep(0.002)
        job.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out.parquet").exists()
    done = subprocess.run([*command, "out.parquet"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert b"of the rows were done when this run began" in done.stdout + done.stderr
    assert pq.read_table(tmp_path / "out.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))


def test_what_does_not_fit_together_is_refused(scored: Callable[..., JobSpec]) -> None:
    with pytest.raises(UsageError, match="--completion-column has texts behind a prompt, and --text-column whole ones"):
        scored(text_column="completion", prompt_column=None)
    with pytest.raises(UsageError, match=r"give one of .*--text-column; got --prompt-column and --text-column"):
        scored(text_column="completion")
    with pytest.raises(UsageError, match="--chat makes prompts"):
        scored(text_column="completion", prompt_column=None, completion_column=None, chat=True)


def test_batch_files_have_no_columns_for_them(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--prompt-logprobs is not for --openai-batch, whose requests ask for"):
        JobSpec(inputs=(tmp_path / "in.jsonl",), output=tmp_path / "out.jsonl", model=str(folder), openai_batch=True,
                sampling=SamplingParams(prompt_logprobs=1))  # fmt: skip


def test_labels_are_scored_as_run_scores_them(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"prompt": ["Hello", STEM, "a"]}), path)
    labels: dict[str, Any] = {"choices": (" user", " model"), "choice_probabilities": True, "prompt_column": "prompt"}
    common: dict[str, Any] = {"inputs": (path,), "model": str(folder), **labels}
    run(score_job(**common, output=tmp_path / "scored.parquet"))
    run(JobSpec(**common, output=tmp_path / "run.parquet"))
    found, expected = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("scored", "run"))
    assert found.equals(expected) and found["choice_probability"].null_count == 0
    with pytest.raises(UsageError, match="--completion-column has a text for each row, and rows choose from labels"):
        score_job(**common, output=tmp_path / "x.parquet", completion_column="prompt")
