"""Whole jobs over batch files: a line for each request, in order, once, also in shards and after the job was killed."""

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

import pyarrow.parquet as pq
import pytest
from batch_files import answered, chat, completion, lines_of, parsed, refused, request, write_batch
from chat_models import SPECIAL, TAGS, save
from command_line import call
from stub_jobs import ENGINES, SCRIPT, SHAPE, STUB, write_json_lines

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.job import run
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.outlook import plan
from batchinfer.jobs.spec import JobSpec, sharded
from batchinfer.jobs.verify import verify
from batchinfer.text.tokenizer import Tokenizer

# The engine of these tests answers with the prompt's first tokens: a model that thinks and calls tools if it is told.
TEMPLATE = """{% if tools %}{# <tool_call>{"name": "f", "arguments": {}}</tool_call> #}{% endif %}\
{%- for message in messages %}{{ message.content }}{% endfor %}{% if enable_thinking %}{{ '<think>' }}{% endif %}"""
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Ulm"}}\n</tool_call>'
FORMATS = {"reasoning_parser": "think", "tool_parser": "hermes"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(
        tmp_path_factory.mktemp("model"), TEMPLATE, special=SPECIAL, tags=[*TAGS, "<tool_call>", "</tool_call>"]
    )
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) + 20
    (folder / "config.json").write_text(json.dumps({**SHAPE, "vocab_size": size, "max_position_embeddings": 256}))
    return folder


def job(model: Path, *inputs: Path, **fields: Any) -> JobSpec:
    given = {"output": inputs[0].parent / "out.jsonl", "sampling": SamplingParams(max_tokens=100)} | fields
    return JobSpec(**{"inputs": inputs, "model": str(model), "openai_batch": True, "any_model": True, **given})


def mixed(count: int) -> list[Any]:
    """Lines of all kinds, a third of them with errors."""
    kinds: list[Callable[[int], Any]] = [
        lambda i: chat(f"r{i}", f"question {i}"),
        lambda i: completion(f"r{i}", f"text {i}", max_tokens=3),
        lambda i: b"{%d" % i,
        lambda i: chat(f"r{i}", "the same", temperature=0.5, seed=1),
        lambda i: request(f"r{i}", "/v1/embeddings", input="x"),
        lambda i: completion(f"r{i}", [5, 6, 7 + i % 2]),
        lambda i: chat("r0", "again"),
        lambda i: chat(f"r{i}", f"a stop {i}", stop="stop"),
        lambda i: b"",
    ]
    return [kinds[i % len(kinds)](i) for i in range(count)]


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines without what depends on when a job began."""
    for line in lines:
        line["response"]["body"].pop("created", None)
    return lines


def test_each_line_has_one_answer_in_order(tmp_path: Path, model: Path) -> None:
    path = write_batch(tmp_path / "in.jsonl", *mixed(27))
    report = run(job(model, path), STUB)
    lines = lines_of(tmp_path / "out.jsonl")
    assert len(lines) == report.rows == 24
    ids = [None if i % 9 == 2 else "r0" if i % 9 == 6 else f"r{i}" for i in range(27) if i % 9 != 8]
    assert [line["custom_id"] for line in lines] == ids
    codes = ["invalid_json_line", "unsupported_url", "duplicate_custom_id"]
    assert [refused(lines[i])[0] for i in (2, 4, 6)] == codes
    texts = ["question 0", None, None, "the same", None, None, None, "a "]
    for line, text in zip(lines[:8], texts, strict=True):
        assert text is None or answered(line).message.content == text
    assert answered(lines[1]).finish_reason == "length" and parsed(lines[1]).usage.completion_tokens == 3  # type: ignore[union-attr]
    assert (report.rows_failed, report.rows_by_error) == (9, dict.fromkeys(codes, 3))
    assert report.rows_duplicate == 3  # of the equal prompts with equal seeds, and of the equal token ids
    assert verify(tmp_path / "out.jsonl")[0].endswith(
        f"24 rows (9 error, 3 length, 12 stop), {report.prompt_tokens} prompt tokens, {report.completion_tokens} "
        "completion tokens"
    )


def test_shards_and_a_job_without_its_last_part_come_to_the_same_lines(tmp_path: Path, model: Path) -> None:
    path = write_batch(tmp_path / "in.jsonl", *mixed(40))
    other = write_batch(tmp_path / "more.jsonl", *mixed(12))  # its custom_ids are taken
    whole = job(model, path, other, commit_rows=7)
    run(whole, STUB)
    lines = lines_of(whole.output)
    created = {line["response"]["body"]["created"] for line in lines if line["error"] is None}
    assert len(created) == 1

    parts = sorted((tmp_path / "out.run" / "parts").iterdir())
    lost = pq.read_metadata(parts[-1]).num_rows
    parts[-1].unlink()
    whole.output.unlink()
    begun = tmp_path / "out.run" / "run.json"
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"created": 1_700_000_000}))
    assert run(whole, STUB).rows_resumed == len(lines) - lost
    resumed = lines_of(whole.output)
    assert {line["response"]["body"]["created"] for line in resumed if line["error"] is None} == {1_700_000_000}
    assert without_time(resumed) == without_time(lines)

    shards = [sharded(whole.output, i, 3) for i in range(3)]
    for i, shard in enumerate(shards):
        run(replace(whole, output=shard, shard=(i, 3)), STUB)
        verify(shard)
    merge_shards(shards, tmp_path / "merged.jsonl", overwrite=False)
    assert without_time(lines_of(tmp_path / "merged.jsonl")) == lines


def test_a_killed_job_goes_on_and_computes_nothing_twice(tmp_path: Path, model: Path) -> None:
    lines = [line for i in range(80) for line in (chat(f"a{i}", f"question {i}"), b"{", completion(f"b{i}", "x"))]
    path = write_batch(tmp_path / "in.jsonl", *lines)
    (tmp_path / "engines_of_the_test.py").write_text(ENGINES)
    (tmp_path / "main.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "main.py", ".", "run", "in.jsonl", "-o", "out.jsonl", "--openai-batch", "--any-model"]
    command += ["--model", str(model), "--commit-rows", "20", "--max-tokens", "100"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    parts = tmp_path / "out.run" / "parts"
    while len(list(parts.glob("*"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL and not (tmp_path / "out.jsonl").exists()
    committed = sum(pq.read_metadata(part).num_rows for part in parts.glob("*"))
    created = json.loads((tmp_path / "out.run" / "run.json").read_text())["created"]
    report = run(job(model, path), STUB)
    assert (report.rows_resumed, report.rows_computed) == (committed, 240 - committed) and 0 < committed < 240
    found = lines_of(tmp_path / "out.jsonl")
    custom_ids = [name for i in range(80) for name in (f"a{i}", None, f"b{i}")]
    assert [line["custom_id"] for line in found] == custom_ids
    assert [answered(line).message.content for line in found[::3]] == [f"question {i}" for i in range(80)]
    assert {line["response"]["body"]["created"] for line in found if line["error"] is None} == {created}
    verify(tmp_path / "out.jsonl")


def test_thinking_and_calls_are_taken_out_of_the_answers_that_may_have_them(tmp_path: Path, model: Path) -> None:
    thought = f"<think>hm</think>Hi {CALL}"
    path = write_batch(
        tmp_path / "in.jsonl",
        chat("a", thought),
        chat("b", thought, tools=[TOOL]),
        chat("c", thought, tools=[TOOL], tool_choice="none"),
        completion("d", thought),
        chat("e", thought, response_format={"type": "json_object"}),
        chat("f", f"{thought}stop it", tools=[TOOL], stop=["stop"]),
        chat("g", CALL, tools=[TOOL]),
    )
    run(job(model, path, **FORMATS, allow_special_tokens=True), STUB)
    a, b, c, d, e, f, g = map(answered, lines_of(tmp_path / "out.jsonl"))
    assert (a.message.content, a.message.reasoning_content, a.message.tool_calls) == (f"Hi {CALL}", "hm", None)
    assert (b.message.content, b.message.reasoning_content, b.finish_reason) == ("Hi", "hm", "tool_calls")
    assert [call.function.arguments for call in b.message.tool_calls] == ['{"town": "Ulm"}']
    assert (c.message.content, c.message.tool_calls) == (f"Hi {CALL}", None)
    assert d.text == e.message.content == thought and not hasattr(e.message, "reasoning_content")
    assert f.message == b.message.model_copy(update={"tool_calls": f.message.tool_calls})
    assert (g.message.content, g.finish_reason) == (None, "tool_calls")


def test_equal_prompts_that_are_read_in_different_ways_are_no_duplicates(tmp_path: Path, model: Path) -> None:
    chats, _, failed = Tokenizer.load(model).encode_chats(
        [[{"role": "user", "content": "<think>hm</think>Hi"}]], allow_special_tokens=True
    )
    assert not failed
    path = write_batch(
        tmp_path / "in.jsonl",
        chat("a", "<think>hm</think>Hi"),
        completion("b", chats.tolist()),
        chat("c", "<think>hm</think>Hi"),
    )
    report = run(job(model, path, **FORMATS, allow_special_tokens=True), STUB)
    a, b, c = map(answered, lines_of(tmp_path / "out.jsonl"))
    assert report.rows_duplicate == 1
    assert (a.message.content, a.message.reasoning_content, b.text) == ("Hi", "hm", "<think>hm</think>Hi")
    assert c.message == a.message


def test_a_request_may_ask_for_several_answers(tmp_path: Path, model: Path) -> None:
    path = write_batch(
        tmp_path / "in.jsonl",
        chat("a", "one two", n=3, temperature=1),
        chat("b", "one", n=2, temperature=0),
        completion("c", "x", n=1),
        chat("d", "one"),
        b"{",
    )
    report = run(job(model, path, n=2), STUB)
    lines = lines_of(tmp_path / "out.jsonl")
    found: list[Any] = [parsed(line) for line in lines[:4]]
    assert [len(each.choices) for each in found] == [3, 2, 1, 2]
    assert [choice.index for choice in found[0].choices] == [0, 1, 2]
    assert {choice.message.content for choice in found[0].choices} == {"one two"}
    assert report.completion_tokens == sum(each.usage.completion_tokens for each in found)
    verify(tmp_path / "out.jsonl")


def test_the_same_lines_are_answered_again_from_an_earlier_output(tmp_path: Path, model: Path) -> None:
    path = write_batch(tmp_path / "in.jsonl", *mixed(18))
    run(job(model, path), STUB)
    more = write_batch(tmp_path / "more.jsonl", *mixed(24))
    report = run(job(model, more, output=tmp_path / "new.jsonl", reuse=(tmp_path / "out.jsonl",)), STUB)
    assert report.rows_reused == 12
    verify(tmp_path / "new.jsonl")
    texts = [
        [line["response"]["body"].get("choices") for line in lines_of(tmp_path / name)]
        for name in ("out.jsonl", "new.jsonl")
    ]
    assert texts[1][:16] == texts[0]


def test_another_choice_of_models_is_another_job(tmp_path: Path, model: Path) -> None:
    path = write_batch(tmp_path / "in.jsonl", chat("a", model=model.name), chat("b", model="gpt-4o"))
    run(job(model, path, any_model=False), STUB)
    ours, other = lines_of(tmp_path / "out.jsonl")
    assert answered(ours).message.content == "Hello"
    assert refused(other) == (
        "model_mismatch",
        f"line 2: model is \"gpt-4o\", and this job runs '{model}'; correct it, or give --any-model",
    )
    with pytest.raises(Refused, match="another template"):
        run(job(model, path), STUB)


def test_plan_tells_what_is_wrong_before_a_weight_is_loaded(tmp_path: Path, model: Path) -> None:
    path = write_batch(tmp_path / "in.jsonl", *mixed(27))
    outlook = plan(job(model, path))
    assert (outlook.rows, outlook.rows_to_run, outlook.duplicates) == (24, 15, 3)
    assert {code: found.rows for code, found in outlook.rows_failing.items()} == {
        "invalid_json_line": 3, "unsupported_url": 3, "duplicate_custom_id": 3,
    }  # fmt: skip
    assert any("mean of the rows' max_tokens" in note for note in outlook.notes)


def test_lines_for_another_model_that_all_fail_are_told_the_flag(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"model": "gpt", "prompt": "hi"}}
    path = write_batch(tmp_path / "in.jsonl", json.dumps(line).encode())
    arguments = "run", path, "-o", tmp_path / "out.jsonl", "--model", model, "--openai-batch"
    code, said = call(capsys, *arguments)
    assert code == 65 and "all with model_mismatch (give --any-model and --overwrite to answer it anyway)" in said
    assert call(capsys, *arguments, "--any-model", "--overwrite") == (0, "")


def test_lines_that_all_fail_are_an_output_too(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_batch(tmp_path / "in.jsonl", b"\xff", b"{}")
    out = tmp_path / "out.jsonl"
    code, said = call(capsys, "run", path, "-o", out, "--model", model, "--openai-batch")
    assert code != 0 and "every row failed" in said and "error_code" not in said
    assert [refused(line)[0] for line in lines_of(out)] == ["invalid_utf8", "bad_line"]


GIVEN: dict[str, Any] = {
    **dict.fromkeys(
        (
            *("id_column", "where", "prompt_column", "prompt_template", "messages_column", "tools_column"),
            *("chat_template_kwargs_column", "choices_column", "json_schema_column", "sampling_params_column"),
        ),
        "x",
    ),
    **dict.fromkeys(("chat", "choice_probabilities", "output_columns", "incremental"), True),
    **{"csv_delimiter": ";", "csv_encoding": "latin-1", "tools": Path("x"), "choices": ("a",), "columns": ("a",)},
}


@pytest.mark.parametrize("name", GIVEN)
def test_flags_about_tables_are_refused_by_name(tmp_path: Path, model: Path, name: str) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", chat("a"))
    with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')} is about a table"):
        job(model, path, **{name: GIVEN[name]})


def test_what_does_not_fit_is_refused(tmp_path: Path, model: Path) -> None:
    path = write_batch(tmp_path / "in.jsonl", chat("a"))
    with pytest.raises(UsageError, match="--any-model is about the requests of --openai-batch"):
        job(model, path, openai_batch=False, prompt_column="prompt")
    with pytest.raises(UsageError, match=r"out.parquet; with --openai-batch its name must end in .jsonl"):
        run(job(model, path, output=tmp_path / "out.parquet"), STUB)
    table = tmp_path / "in.parquet"
    path.rename(table)
    with pytest.raises(Refused, match=r"has the suffix '.parquet'; expected one of .jsonl, .ndjson"):
        run(job(model, table), STUB)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(Refused, match="no bytes"):
        run(job(model, empty), STUB)
