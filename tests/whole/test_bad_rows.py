"""A row that cannot run is an error of its own, and the rows beside it are answered; what is merely odd is answered."""

import json
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from command_line import STUB, call
from stub_jobs import CONTEXT, counts, expected, make_model, recount, spec

from batchinfer.engine import prompts
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.jobs.job import run

CHATML = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('No tools here') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("chat"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in ("<|im_start|>", "<|im_end|>"):
        added = dict(tokenizer["added_tokens"][0], id=1 + max(t["id"] for t in all_tokens(tokenizer)), content=token)
        tokenizer["added_tokens"].append(added)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": "<eos>"}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 2}))
    return folder


def all_tokens(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    return [*tokenizer["added_tokens"], *({"id": i} for i in tokenizer["model"]["vocab"].values())]


def raw_text(values: list[Any]) -> pa.Array:
    """Text, of bytes too; what is no UTF-8 stays so."""
    raw = pa.array([v.encode() if isinstance(v, str) else v for v in values], pa.binary())
    return pc.cast(raw, options=pc.CastOptions(pa.string(), allow_invalid_utf8=True))


ODD = [" \t\n", "a\0b", "\0", "\u202eabc\u202d", "e\u0301", "🦊", "\ufeffx", "<|im_end|>", "<eos>", "{prompt}", "\r\n"]
ERRORS: list[tuple[Any, str]] = [
    (None, "null_prompt"),
    ("", "empty_prompt"),
    ("x" * CONTEXT, "too_long"),
    (b"\xff\xfe", "invalid_utf8"),
    ("y" * 5000, "too_large"),
]


def among_good(bad: list[Any]) -> list[Any]:
    """A good row before, between and behind the bad ones."""
    return [value for each in bad for value in ("good", each)] + ["good"]


def write_as(path: Path, values: list[Any]) -> Path:
    """The column 'prompt' in the format of the name."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"prompt": raw_text(values), "n": range(len(values))}), path)
    elif path.suffix == ".jsonl":
        lines = [json.dumps({"prompt": "BYTES" if isinstance(v, bytes) else v, "n": i}) for i, v in enumerate(values)]
        path.write_bytes(b"\n".join(line.encode().replace(b"BYTES", b"\xff\xfe") for line in lines))
    else:
        quoted = [v if isinstance(v, bytes) else '"{}"'.format(v.replace('"', '""')).encode() for v in values]
        path.write_bytes(b"prompt,n\n" + b"".join(cell + b",%d\n" % i for i, cell in enumerate(quoted)))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_a_bad_row_is_an_error_and_its_neighbours_are_answered(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prompts, "MAX_PROMPT_BYTES", 4999)
    bad = [pair for pair in ERRORS if not (suffix == ".csv" and pair[0] is None)]  # CSV has no nulls
    path = write_as(tmp_path / f"in{suffix}", among_good([value for value, _ in bad]))
    assert call(capsys, "run", path, "-o", tmp_path / "out.parquet", "--model", model) == (0, "")
    out = pq.read_table(tmp_path / "out.parquet")
    assert out["error_code"].to_pylist() == [*(code for _, error in bad for code in (None, error)), None]
    assert out["generated_text"].to_pylist() == [*(["good", None] * len(bad)), "good"]
    assert [int(n) for n in out["n"].to_pylist()] == list(range(2 * len(bad) + 1))
    assert all("yyy" not in message for message in out["error_message"].drop_null().to_pylist())


def test_what_was_refused_is_kept_as_text_that_can_be_read(tmp_path: Path, model: Path) -> None:
    values = among_good([value for value, _ in ERRORS])
    path = write_as(tmp_path / "in.parquet", values)
    report = run(spec(model, path), STUB)
    kept = pq.read_table(tmp_path / "out.parquet")["prompt"].to_pylist()
    assert kept == [v.decode(errors="replace") if isinstance(v, bytes) else v for v in values]
    assert counts(report) == recount(tmp_path / "out.parquet")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_odd_text_is_answered_as_it_is(tmp_path: Path, model: Path, suffix: str) -> None:
    path = write_as(tmp_path / f"in{suffix}", ODD)
    report = run(spec(model, path, sampling=SamplingParams(max_tokens=40)), STUB)
    out = pq.read_table(tmp_path / "out.parquet")
    assert report.rows_failed == 0 and out["prompt"].to_pylist() == ODD
    plain = [text for text in ODD if text != "<eos>"]
    answers = dict(zip(ODD, out["generated_text"].to_pylist(), strict=True))
    assert [answers[text] for text in plain] == expected(model, plain, limit=40)
    assert answers["<eos>"] == "<eos>"  # as text: it is no end of text


def test_the_longest_prompt_that_fits_and_a_row_that_never_ends(tmp_path: Path, model: Path) -> None:
    path = write_as(tmp_path / "in.parquet", ["x" * (CONTEXT - 1), "x" * CONTEXT, "x" * (CONTEXT + 1), "x" * 20])
    run(spec(model, path), STUB)
    out = pq.read_table(tmp_path / "out.parquet")
    assert out["finish_reason"].to_pylist() == ["length", "error", "error", "length"]
    assert out["completion_tokens"].to_pylist() == [1, None, None, 8]


IMAGE = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}, {"type": "text", "text": "what?"}]
GOOD_CHAT = [{"role": "user", "content": "hi <|im_end|>"}]
BAD_CHATS: list[tuple[Any, str]] = [
    (None, "null_prompt"),
    ([], "bad_messages"),
    ([{"role": "oracle", "content": "hi"}], "bad_messages"),
    ([{"role": "user"}], "bad_messages"),
    ([{"content": "hi"}], "bad_messages"),
    ([{"role": "user", "content": IMAGE}], "bad_messages"),
    ([{"role": "tool", "content": "x"}], "template_error"),
    ([{"role": "user", "content": "\ud800"}], "invalid_utf8"),
    ("hi", "bad_messages"),
    (7, "bad_messages"),
    ({"role": "user", "content": "hi"}, "bad_messages"),
    ([["user", "hi"]], "bad_messages"),
    ([{"role": "user", "content": "x" * CONTEXT}], "too_long"),
]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("something is fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("kind", ["json text in parquet", "values in json lines"])
def test_a_bad_conversation_is_an_error_and_images_are_never_fetched(
    tmp_path: Path, chat_model: Path, no_network: None, kind: str
) -> None:
    chats = [chat for bad, _ in BAD_CHATS for chat in (GOOD_CHAT, bad)]
    if kind == "json text in parquet":
        path = tmp_path / "in.parquet"
        texts = [chat if chat is None else json.dumps(chat) for chat in chats]
        pq.write_table(pa.table({"chat": [*texts, "[" * 100_000]}), path)
    else:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps({"chat": chat}) + "\n" for chat in [*chats, "[" * 100_000]))
    job = spec(chat_model, path, prompt_column=None, messages_column="chat", sampling=SamplingParams(max_tokens=60))
    run(job, STUB)
    out = pq.read_table(tmp_path / "out.parquet")
    codes = [code for _, error in BAD_CHATS for code in (None, error)]
    assert out["error_code"].to_pylist() == [*codes, "bad_messages"]
    # The text of a control token in a message is plain text: more tokens than the token itself.
    shown = {text for text in out["generated_text"].to_pylist() if text is not None}
    assert len(shown) == 1 and "hi <|im_end|>" in shown.pop()


def test_values_of_json_that_are_no_prompt(tmp_path: Path, model: Path) -> None:
    values: list[Any] = ["good", 3, True, 1.5, ["a"], {"b": 1}, None, "good", "half \ud800"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": value}) + "\n" for value in values))
    run(spec(model, tmp_path / "in.jsonl"), STUB)
    out = pq.read_table(tmp_path / "out.parquet")
    assert out["error_code"].to_pylist() == [None, *["wrong_type"] * 5, "null_prompt", None, "invalid_utf8"]


def test_a_bad_value_of_a_template_is_an_error_of_its_row(tmp_path: Path, model: Path) -> None:
    columns = {"a": raw_text(["x", None, b"\xff", "x", "x"]), "b": [1.5, 1.0, 1.0, None, float("nan")]}
    far = pa.array([2**62, 0, 0, 0, 0], pa.timestamp("us"))
    pq.write_table(pa.table({**columns, "t": far}), tmp_path / "in.parquet")
    run(spec(model, tmp_path / "in.parquet", prompt_column=None, prompt_template="{a}{b}{t}"), STUB)
    out = pq.read_table(tmp_path / "out.parquet")
    assert out["error_code"].to_pylist() == [None, "null_prompt", "invalid_utf8", "null_prompt", None]


def test_more_errors_than_allowed_end_the_job(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_as(tmp_path / "in.parquet", ["a", "", None, "d"])
    common = ["run", path, "-o", tmp_path / "out.parquet", "--model", model]
    code, line = call(capsys, *common, "--max-error-rate", "0.4")
    assert (code, "2 of 4 rows failed" in line) == (65, True)
    assert not (tmp_path / "out.parquet").exists()
    assert call(capsys, *common, "--max-error-rate", "0.5")[0] == 0
