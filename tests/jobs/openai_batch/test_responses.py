"""Output lines: as OpenAI's types have them, with the same ids whenever the same rows are written."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from batch_files import answered, chat, completion, lines_of, parsed, refused

from batchinfer.errors import Refused
from batchinfer.jobs.openai_batch.responses import SCHEMA, Responses, counted
from batchinfer.jobs.results.output_writer import OutputWriter
from batchinfer.jobs.results.schema import COUNTED, result_fields, sample_type
from batchinfer.jobs.results.score_columns import answer_score_fields

OF_ANSWERS = answer_score_fields(2)
FIELDS = [
    pa.field("line", pa.large_binary()),
    *result_fields(True, ("reasoning", "tool_calls"), of_answers=OF_ANSWERS),
]
SAMPLE = list(sample_type(("reasoning", "tool_calls"), OF_ANSWERS))
DIGESTS = {"input": "a", "sampling": "b", "engine": "c", "shard": "0 of 2"}


def row(line: Any, **values: Any) -> dict[str, Any]:
    usual = {"generated_text": "Hi", "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 2}
    found = dict.fromkeys(field.name for field in FIELDS) | usual | {"line": json.dumps(line).encode()} | values
    samples = None if found["error_code"] else [{field.name: found[field.name] for field in SAMPLE}]
    return found | ({"samples": samples} if found["samples"] is None else {})


CALLS = [{"name": "weather", "arguments": '{"town": "Ulm"}'}, {"name": "time", "arguments": "{}"}]
NOTHING = {"generated_text": None, "finish_reason": "error", "prompt_tokens": None, "completion_tokens": None}
ROWS = [
    row(chat("a")),
    row(completion("b"), finish_reason="length"),
    row(chat("c"), reasoning="So...", generated_text="", tool_calls=CALLS),
    row(chat("d"), tool_calls=CALLS[:1], finish_reason="length"),
    row({"custom_id": "e"}, **NOTHING, error_code="bad_line", error_message="line 5: it has no 'url'"),
    row([], **NOTHING, error_code="bad_line", error_message="line 6: it holds a list"),
    row(
        chat("g"),
        generated_text=None,
        finish_reason="error",
        completion_tokens=0,
        error_code="not_finite",
        error_message="x",
    ),
]


def written(path: Path, rows: list[dict[str, Any]] = ROWS, **fields: Any) -> list[dict[str, Any]]:
    given = {"model": "org/m", "fingerprints": DIGESTS, "first_row": 0, "created": 1_700_000_000} | fields
    path.unlink(missing_ok=True)
    with OutputWriter(path, path, SCHEMA) as writer:
        writer.write(Responses(**given).of(0, pa.Table.from_pylist(rows, pa.schema(FIELDS))))
    return lines_of(path)


def test_lines_parse_as_the_client_library_s_types(tmp_path: Path) -> None:
    lines = written(tmp_path / "out.jsonl")
    assert [line["custom_id"] for line in lines] == ["a", "b", "c", "d", "e", None, "g"]
    hi, cut, called, half = (answered(line) for line in lines[:4])
    assert (hi.message.content, hi.finish_reason, hi.message.tool_calls) == ("Hi", "stop", None)
    assert (cut.text, cut.finish_reason) == ("Hi", "length")
    assert (called.message.content, called.finish_reason) == (None, "tool_calls")
    assert called.message.reasoning_content == "So..." and not hasattr(hi.message, "reasoning_content")
    functions = [call.function for call in called.message.tool_calls]
    assert [{"name": call.name, "arguments": call.arguments} for call in functions] == CALLS
    assert (half.message.content, half.finish_reason, len(half.message.tool_calls)) == ("Hi", "length", 1)
    assert [refused(line)[0] for line in lines[4:]] == ["bad_line", "bad_line", "not_finite"]
    assert [line["response"]["status_code"] for line in lines] == [200] * 4 + [400, 400, 500]
    for line in lines[:4]:
        found: Any = parsed(line)
        assert (found.model, found.created, found.usage.total_tokens) == ("org/m", 1_700_000_000, 5)


def test_a_request_for_several_answers_gets_a_choice_for_each(tmp_path: Path) -> None:
    usual = {"finish_reason": "stop", "completion_tokens": 2, "generated_text": ""}
    samples = [usual | {"tool_calls": CALLS}, usual | {"generated_text": "b", "finish_reason": "length"}]
    (line,) = written(tmp_path / "out.jsonl", [row(chat("a", n=2), samples=samples)])
    found: Any = parsed(line)
    first, second = found.choices
    assert (first.index, first.finish_reason, second.index, second.finish_reason) == (0, "tool_calls", 1, "length")
    assert second.message.content == "b" and found.usage.completion_tokens == 4
    (table,) = counted(tmp_path / "out.jsonl")
    assert table["completion_tokens"].to_pylist() == [4]


def test_ids_are_those_of_the_row_in_the_whole_job(tmp_path: Path) -> None:
    lines = written(tmp_path / "out.jsonl")
    ids = [
        text
        for line in lines
        for text in (line["id"], line["response"]["request_id"], line["response"]["body"].get("id"))
    ]
    assert len(set(ids) - {None}) == 7 * 2 + 4
    other_engine = DIGESTS | {"engine": "x", "shard": "1 of 2"}
    assert written(tmp_path / "out.jsonl", ROWS[3:], first_row=3, fingerprints=other_engine) == lines[3:]
    other_job = written(tmp_path / "out.jsonl", fingerprints=DIGESTS | {"sampling": "x"})
    assert not {line["id"] for line in lines} & {line["id"] for line in other_job}


def test_the_counts_are_those_of_the_rows(tmp_path: Path) -> None:
    written(tmp_path / "out.jsonl")
    found = pa.concat_tables(counted(tmp_path / "out.jsonl")).to_pylist()
    assert found == [{name: each[name] for name in COUNTED} for each in ROWS]


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b"{}", b'{"error": null, "response": {"body": {"choices": []}}}', b"null"]
)
def test_a_line_that_is_no_response_is_refused(tmp_path: Path, line: bytes) -> None:
    written(tmp_path / "out.jsonl")
    with (tmp_path / "out.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(Refused, match="line 8 is not a response"):
        list(counted(tmp_path / "out.jsonl"))
