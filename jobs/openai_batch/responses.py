"""The lines of a batch's output: a response for each request, or its error.

Their form: https://platform.openai.com/docs/api-reference/batch/request-output. A request that failed has both a
response, with a status and an error object as the service's API has it, and an `error` with the same code and message:
some readers look at the one, some at the other.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchinfer.errors import Refused
from batchinfer.jobs.openai_batch import logprobs
from batchinfer.jobs.openai_batch.request import custom_id_of, read_request
from batchinfer.jobs.results.schema import COUNTED, RESULT_FIELDS, SAMPLES
from batchinfer.jobs.results.score_columns import LOGPROBS
from batchinfer.jobs.tables.lines import LINE

COLUMNS = [LINE]  # of the input, from which the output is written
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("custom_id", pa.string()),
        pa.field("response", pa.json_()),
        pa.field("error", pa.json_()),
    ]
)
NO_FAULT_OF_THE_REQUEST = {"engine_died", "not_finite"}
SLICE_ROWS = 1024

Row = Mapping[str, Any]


class Responses:
    """Makes output lines of rows. The same row of the same job has the same ids, however often it is run or resumed."""

    schema = SCHEMA

    def __init__(self, model: str, fingerprints: Mapping[str, str], first_row: int, created: int) -> None:
        """`first_row` is the ordinal of the table's first row in the whole job, and `created` when the job began, in
        seconds since 1970."""
        self._model, self._first_row, self._created = model, first_row, created
        same = {name: value for name, value in fingerprints.items() if name not in ("engine", "shard")}
        self._key = hashlib.blake2b(json.dumps(same, sort_keys=True).encode(), digest_size=32).digest()

    def of(self, first: int, rows: pa.Table) -> pa.Table:
        """Return the output's rows for rows from ordinal `first` on, with their lines and results."""
        lines = [self._line(first + i, row) for i, row in enumerate(rows.to_pylist())]
        columns = {
            name: [line[name] if name in ("id", "custom_id") else _json(line[name]) for line in lines]
            for name in SCHEMA.names
        }
        arrays = [pa.array(columns[field.name], pa.string()).cast(field.type) for field in SCHEMA]
        return pa.Table.from_arrays(arrays, schema=SCHEMA)

    def _line(self, row: int, values: Row) -> dict[str, Any]:
        name = hashlib.blake2b(str(self._first_row + row).encode(), digest_size=16, key=self._key).hexdigest()
        failed = values["error_code"] is not None
        error = {"code": values["error_code"], "message": values["error_message"]} if failed else None
        status, body = self._failure(values) if failed else (200, self._completion(name, values))
        return {
            "id": f"batch_req_{name}",
            "custom_id": custom_id_of(values[LINE]),
            "response": {"status_code": status, "request_id": f"req_{name}", "body": body},
            "error": error,
        }

    def _failure(self, values: Row) -> tuple[int, dict[str, Any]]:
        ours = values["error_code"] in NO_FAULT_OF_THE_REQUEST
        error = {
            "message": values["error_message"],
            "type": "server_error" if ours else "invalid_request_error",
            "param": None,
            "code": values["error_code"],
        }
        computed = values["prompt_tokens"] is not None
        return 500 if ours else 400, {"error": error} | ({"usage": _usage(values)} if computed else {})

    def _completion(self, name: str, values: Row) -> dict[str, Any]:
        chat = read_request(values[LINE], None).chat
        choices = [
            {"index": i, **(_message(f"call_{name}_{i}", sample) if chat else _text(sample))}
            for i, sample in enumerate(values[SAMPLES])
        ]
        return {
            "id": f"chatcmpl-{name}" if chat else f"cmpl-{name}",
            "object": "chat.completion" if chat else "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "usage": _usage(values),
        }


def _text(sample: Row) -> dict[str, Any]:
    return {
        "text": sample["generated_text"],
        "finish_reason": sample["finish_reason"],
        "logprobs": logprobs.of_completion(sample[LOGPROBS]),
    }


def _message(name: str, sample: Row) -> dict[str, Any]:
    """Return a choice of a chat; `name` is the beginning of the ids of its calls."""
    message: dict[str, Any] = {"role": "assistant", "content": sample["generated_text"], "refusal": None}
    reason = sample["finish_reason"]
    if (reasoning := sample.get("reasoning")) is not None:
        message["reasoning_content"] = reasoning
    if calls := sample.get("tool_calls"):
        message["content"] = message["content"] or None
        message["tool_calls"] = [
            {"id": f"{name}_{i}", "type": "function", "function": dict(call)} for i, call in enumerate(calls)
        ]
        reason = "tool_calls" if reason == "stop" else reason
    return {"message": message, "finish_reason": reason, "logprobs": logprobs.of_chat(sample[LOGPROBS])}


def _usage(values: Row) -> dict[str, int]:
    prompt, samples = values["prompt_tokens"], values[SAMPLES] or [values]
    completion = sum(sample["completion_tokens"] for sample in samples)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def counted(path: Path) -> Iterator[pa.Table]:
    """Yield the columns that `verify` counts, from a finished output. Raises `Refused` if it is damaged."""
    types = {field.name: field.type for field in RESULT_FIELDS}
    with path.open("rb") as file:
        number = 0
        while rows := [_counts(path, number + i, line) for i, line in enumerate(islice(file, SLICE_ROWS), 1)]:
            number += len(rows)
            yield pa.table({name: pa.array([row[name] for row in rows], types[name]) for name in COUNTED})


def _counts(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
        error, body = value["error"], value["response"]["body"]
        usage = body["usage"] if error is None else body.get("usage", {})
        reason = "error" if error else "length" if body["choices"][0]["finish_reason"] == "length" else "stop"
        tokens = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
        return {"finish_reason": reason, "error_code": error and error["code"], **tokens}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise Refused(f"{path} is damaged: line {number} is not a response: {error}") from error
