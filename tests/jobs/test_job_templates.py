"""Whole jobs with a template, arguments and tools of the user's own, through the command line too."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from chat_models import HYBRID, NEEDY
from command_line import call
from measured_devices import SHAPE
from stub_jobs import STUB, make_model, spec, write, write_json_lines

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.cli.run import job_of
from batchinfer.jobs.job import run
from batchinfer.jobs.merge_shards import merge_shards
from batchinfer.jobs.outlook import plan
from batchinfer.jobs.spec import JobSpec, sharded

# The stub engine answers with the prompt, so that an answer shows what the template made of the row.
SHOWN = "{{ messages[0].content }}:{{ mood | default('none') }}:{{ tools | tojson if tools else '' }}"
LONG = SamplingParams(max_tokens=200)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "chat").mkdir()
    folder = make_model(tmp_path / "chat", **{**SHAPE, "max_position_embeddings": 1024})
    (folder / "chat_template.jinja").write_text(SHOWN)
    return folder


def job(model: Path, path: Path, **fields: Any) -> JobSpec:
    return spec(model, path, **{"chat": True, "sampling": LONG, **fields})


def texts(path: Path) -> list[str | None]:
    found: list[str | None] = pq.read_table(path)["generated_text"].to_pylist()
    return found


def test_a_file_takes_the_place_of_the_checkpoints_template(tmp_path: Path, model: Path) -> None:
    path, own = write(tmp_path / "in.parquet", prompt=["a", "b"]), tmp_path / "own.jinja"
    own.write_text("mine {{ messages[0].content }}")
    (model / "chat_template.jinja").write_text("{% if %} broken, and not read")
    run(job(model, path, chat_template=own), STUB)
    assert texts(tmp_path / "out.parquet") == ["mine a", "mine b"]
    own.write_text("yours {{ messages[0].content }}")
    with pytest.raises(Refused, match="begun with another template,"):
        run(job(model, path, chat_template=own), STUB)
    (tmp_path / "moved.jinja").write_text("mine {{ messages[0].content }}")
    run(job(model, path, chat_template=tmp_path / "moved.jinja"), STUB)  # what counts is what it holds


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{% if %}", r"own.jinja: the chat template has a syntax error on line 1: Expected an expression"),
        (b"\n\n{{ \xff }}", r"own.jinja is not UTF-8"),
        (b" \n", r"own.jinja is empty; expected a chat template"),
        (b"{{ ''.__class__.__mro__ }}", r"own.jinja: the chat template did what its sandbox forbids; take another one"),
        (None, r"--chat-template .*own.jinja: No such file or directory; correct the path"),
    ],
)
def test_what_is_wrong_with_a_template_is_said_with_its_file(
    tmp_path: Path, model: Path, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "own.jinja").write_bytes(content)
    with pytest.raises(Refused, match=said):
        run(job(model, write(tmp_path / "in.parquet", prompt=["a"]), chat_template=tmp_path / "own.jinja"), STUB)
    assert not (tmp_path / "out.run").exists()


KWARGS = [{"mood": "sad", "n": None}, {"mood": None, "n": 1}, None]


@pytest.mark.parametrize("kind", ["struct", "map", "text", "json lines", "csv"])
def test_a_rows_arguments_win_over_the_flags(tmp_path: Path, model: Path, kind: str) -> None:
    prompts, expected = ["a", "b", "c"], ["a:sad:", "b:glad:", "c:glad:"]
    as_text = [None if value is None else json.dumps(value) for value in KWARGS]
    if kind == "json lines":
        path = write_json_lines(
            tmp_path / "in.jsonl", *({"prompt": p, "k": k} for p, k in zip(prompts, KWARGS, strict=True))
        )
    elif kind == "csv":
        path = tmp_path / "in.csv"
        path.write_text(
            "prompt,k\n"
            + "".join(
                f'{p},"{(t or "").replace(chr(34), chr(34) * 2)}"\n' for p, t in zip(prompts, as_text, strict=True)
            )
        )
    elif kind == "map":
        pairs = [value and [(k, v) for k, v in value.items() if k == "mood"] for value in KWARGS]
        path = write(tmp_path / "in.parquet", prompt=prompts, k=pa.array(pairs, pa.map_(pa.string(), pa.string())))
    else:
        path = write(tmp_path / "in.parquet", prompt=prompts, k=KWARGS if kind == "struct" else as_text)
    made = job(
        model,
        path,
        chat_template_kwargs={"mood": "glad"},
        chat_template_kwargs_column="k",
        output=tmp_path / "o.parquet",
    )
    report = run(made, STUB)
    if kind in ("text", "json lines", "csv"):
        expected[1] = "b:None:"  # a null that JSON writes is an argument
    assert texts(tmp_path / "o.parquet") == expected
    assert [note for note in report.notes if "in vain" in note] == (
        [f"the chat template of {model} never reads n: given in vain by --chat-template-kwargs-column k"]
        if kind != "map"  # whose rows have no other names
        else []
    )


def test_bad_arguments_are_errors_of_their_rows(tmp_path: Path, model: Path) -> None:
    given = ["[1]", "{", '{"tools": 1}', '{"mood": "\\ud800"}', '{"mood": "ok"}', ""]
    path = write(tmp_path / "in.parquet", prompt=["x"] * 6, k=given)
    run(job(model, path, chat_template_kwargs_column="k"), STUB)
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    bad = "bad_chat_template_kwargs"
    assert [row["error_code"] for row in found] == [bad, bad, bad, "invalid_utf8", None, None]
    assert "'tools', a name that is reserved" in found[2]["error_message"]
    assert [row["generated_text"] for row in found[4:]] == ["x:ok:", "x:none:"]
    with pytest.raises(Refused, match="column 'k' is int64; expected structs, or maps"):
        run(job(model, write(tmp_path / "b.parquet", prompt=["x"], k=[1]), chat_template_kwargs_column="k"), STUB)


def test_an_argument_that_all_rows_need_is_asked_for_before_the_first(tmp_path: Path, model: Path) -> None:
    (model / "chat_template.jinja").write_text(NEEDY)
    path = write(tmp_path / "in.parquet", prompt=["a", "b"], k=['{"style": {}, "language": "Welsh"}', None])
    said = "the chat template needs the argument 'style'; give it with --chat-template-kwargs"
    with pytest.raises(Refused, match=said):
        run(job(model, path), STUB)
    assert not (tmp_path / "out.run").exists()
    run(job(model, path, chat_template_kwargs_column="k"), STUB)
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["generated_text"], row["error_code"]) for row in rows] == [
        ("a in Welsh<|im_end|>", None),
        (None, "missing_argument"),
    ]
    run(job(model, path, chat_template_kwargs={"style": {"tone": "!"}}, overwrite=True), STUB)
    assert texts(tmp_path / "out.parquet") == ["a in !<|im_end|>", "b in !<|im_end|>"]


def test_arguments_are_part_of_the_job(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "in.parquet", prompt=["a"])
    first = job(model, path, chat_template_kwargs={"mood": "glad", "moot": 1})
    said = f"the chat template of {model} never reads moot: given in vain by --chat-template-kwargs"
    assert run(first, STUB).notes == [said] and said in capsys.readouterr().err
    assert said in plan(first).notes
    for other in ({"mood": "sad", "moot": 1}, None):
        with pytest.raises(Refused, match="begun with another template,"):
            run(replace(first, chat_template_kwargs=other), STUB)


TOOLS = [{"name": "f"}]


def test_a_file_of_tools_is_offered_to_every_chat(tmp_path: Path, model: Path) -> None:
    path, tools = write(tmp_path / "in.parquet", prompt=["a", "b"]), tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    (note,) = run(job(model, path, tools=tools), STUB).notes
    assert note == "tool calls stay in generated_text: the chat template shows no format that is known"
    assert texts(tmp_path / "out.parquet") == [f"{p}:none:{json.dumps(TOOLS)}" for p in "ab"]
    tools.write_text('[{"name": "g"}]')
    with pytest.raises(Refused, match="begun with another template,"):
        run(job(model, path, tools=tools), STUB)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (note,) = run(job(model, path, tools=tools, output=tmp_path / "o.parquet"), STUB).notes
    assert note == f"the chat template of {model} never reads tools: --tools {tools} is in vain"


@pytest.mark.parametrize("content", ["{", '{"name": "f"}', "[]", "[1]", "null"])
def test_a_file_that_holds_no_tools_is_refused(tmp_path: Path, model: Path, content: str) -> None:
    (tmp_path / "tools.json").write_text(content)
    path = write(tmp_path / "in.parquet", prompt=["a"])
    with pytest.raises(Refused, match=r"--tools .*tools.json: .*; give a JSON list of schemas"):
        run(job(model, path, tools=tmp_path / "tools.json"), STUB)
    with pytest.raises(Refused, match=r"--tools .*none.json: No such file"):
        run(job(model, path, tools=tmp_path / "none.json"), STUB)


def test_flags_for_chats_need_chats(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in.parquet", prompt=["a"])
    for field, value in {"tools": path, "chat_template": path, "chat_template_kwargs": {}}.items():
        with pytest.raises(UsageError, match=f"--{field.replace('_', '-')} needs --chat or --messages-column"):
            spec(model, path, **{field: value})
    with pytest.raises(UsageError, match="leave one of them out"):
        job(model, path, tools=path, tools_column="t")
    begin = [str(path), "-o", "o.parquet", "--model", "m", "--chat", "--chat-template-kwargs"]
    for given, said in {
        "no": "is 'no'; it must be a JSON object",
        "[]": "must be an object",
        '{"a": 1, "a": 2}': "is .*; it must be a JSON object: it has a key twice",
        '{"a": "\\ud800"}': "is .*; it must be a JSON object",
        '{"add_generation_prompt": false}': "has 'add_generation_prompt', a name that is reserved",
    }.items():
        with pytest.raises(UsageError, match=f"--chat-template-kwargs {said}"):
            job_of([*begin, given])
    (tmp_path / "job.toml").write_text("chat = true\n[chat-template-kwargs]\nmodel = 'in.parquet'\nn = 1.5\n")
    found = job_of([str(path), "-o", "o.parquet", "--model", "m", "--config", str(tmp_path / "job.toml")])
    assert found.chat_template_kwargs == {"model": "in.parquet", "n": 1.5}


def test_shards_of_the_command_line_merge_to_the_whole(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kwargs = [{"enable_thinking": value} for value in (True, False, None)] * 4
    path = write(tmp_path / "in.parquet", prompt=[f"row {i}" for i in range(12)], k=kwargs)
    (tmp_path / "own.jinja").write_text(HYBRID)
    out = tmp_path / "o.jsonl"
    line = [
        "run", path, "-o", out, "--model", model, "--chat", "--chat-template", tmp_path / "own.jinja",
        "--chat-template-kwargs-column", "k", "--max-tokens", 500, "--reasoning-parser", "none",
    ]  # fmt: skip
    for shard in range(2):
        assert call(capsys, *line, "--shard", f"{shard}/2") == (0, "")
    merge_shards([sharded(out, i, 2) for i in range(2)], tmp_path / "merged.jsonl", False)
    assert call(capsys, *line) == (0, "")
    assert (tmp_path / "merged.jsonl").read_text() == out.read_text()
    lines = [json.loads(line)["generated_text"] for line in out.read_text().splitlines()]
    assert [text.endswith("</think>\n\n") for text in lines] == [False, True, False] * 4
