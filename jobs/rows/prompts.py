"""Making token ids from the rows of a table, by a column, a template over columns, or messages; or a row's error."""

import json
import operator
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from batchinfer.engine.prompts import (
    BadPrompt,
    Conversation,
    Errors,
    check_messages,
    encode_chats,
    keys_by_tokens,
    requests_that_fit,
    row_seeds,
    size_errors,
)
from batchinfer.engine.request import Requests, RowError
from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.ids import as_text, id_bytes
from batchinfer.jobs.tables.json_lines import indices_not_text
from batchinfer.jobs.tables.table import find_field
from batchinfer.text.tokenizer import Tokenizer


class PromptSource:
    """Makes requests from record batches. `columns` are the table's columns that it needs."""

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer, max_model_len: int, schema: pa.Schema) -> None:
        """Raises `Refused`, naming file and column, if the table or the checkpoint does not fit, and `UsageError` for a
        wrong prompt template."""
        self._spec = spec
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._system: Conversation = []
        if spec.system_prompt is not None:
            self._system = [{"role": "system", "content": spec.system_prompt}]
        file = spec.inputs[0]
        if spec.prompt_template is not None:
            self._template = parse_template(spec.prompt_template)
            names = [name for _, name in self._template if name is not None]
            _check_types(file, schema, names, _is_scalar, "text, a number, a boolean or a date")
            _check_zones(file, schema, names)
        elif spec.messages_column is not None:
            names = [spec.messages_column]
            _check_types(
                file,
                schema,
                names,
                _is_messages,
                "a list of {role, content} without times in nanoseconds, or its JSON as text",
            )
        else:
            names = [spec.prompt_column or "prompt"]
            _check_types(file, schema, names, _is_text, "text")
        if spec.id_column is not None:
            _check_types(file, schema, [spec.id_column], _is_id, "text or an integer")
            names.append(spec.id_column)
        self.columns = list(dict.fromkeys(names))
        if (spec.chat or spec.messages_column is not None) and tokenizer.template is None:
            raise Refused(
                f"{spec.tokenizer or spec.model} has no chat template; give plain prompts with --prompt-column, or a "
                "tokenizer that has one with --tokenizer"
            )

    def tokenize(self, first_row: int, batch: pa.RecordBatch) -> tuple[Requests, dict[int, RowError]]:
        """Return requests for the rows that can run, in table order, and the errors of the other rows, by ordinal."""
        errors: Errors = {}
        special = self._spec.allow_special_tokens
        if self._spec.messages_column is not None:
            indices, conversations = self._conversations(batch, errors)
            token_ids, offsets = encode_chats(self._tokenizer, indices, conversations, errors, special)
        else:
            column = self._templated(batch, errors) if self._spec.prompt_template else self._plain(batch, errors)
            indices, texts = _good_texts(column, errors)
            if self._spec.chat:
                chats = [[*self._system, {"role": "user", "content": text}] for text in texts]
                token_ids, offsets = encode_chats(self._tokenizer, indices, chats, errors, special)
            else:
                token_ids, offsets = self._tokenizer.encode_batch(texts, special)

        sampling = self._spec.sampling
        requests = requests_that_fit(indices, token_ids, offsets, sampling, self._max_model_len, errors)
        seeds = self._seeds(requests, batch) if sampling.temperature > 0 else requests.seeds
        by_row = {first_row + index: error for index, error in sorted(errors.items())}
        return replace(requests, rows=first_row + requests.rows, seeds=seeds), by_row

    def _plain(self, batch: pa.RecordBatch, errors: Errors) -> pa.Array:
        name = self.columns[0]
        for index in indices_not_text(batch, name):
            errors[index] = RowError("wrong_type", f"column {name!r} holds a value that is not text")
        return _text_column(batch, name, errors)

    def _templated(self, batch: pa.RecordBatch, errors: Errors) -> pa.Array:
        parts: list[Any] = []
        for literal, name in self._template:
            parts.append(pa.scalar(literal, pa.large_string()))
            if name is not None:
                parts.append(_text_column(batch, name, errors))
        return pc.binary_join_element_wise(*parts, pa.scalar("", pa.large_string()))

    def _conversations(self, batch: pa.RecordBatch, errors: Errors) -> tuple[NDArray[np.int64], list[Conversation]]:
        name = self.columns[0]
        column = batch.column(name)
        convert: Callable[[Any], Any]
        if _is_text(column.type):
            candidates, values = _good_texts(_text_column(batch, name, errors), errors)
            convert = _parse_json
        else:
            candidates, values = np.arange(len(column)), column
            convert = operator.methodcaller("as_py")
        indices, conversations = [], []
        for index, value in zip(candidates.tolist(), values, strict=True):
            try:
                messages = convert(value)
                check_messages(messages)
            except BadPrompt as error:
                errors[index] = error.row_error
            except UnicodeDecodeError:
                errors[index] = _invalid_utf8(name)
            else:
                system = [] if messages[0]["role"] == "system" else self._system
                indices.append(index)
                conversations.append([*system, *messages])
        return np.array(indices, np.int64), conversations

    def _seeds(self, requests: Requests, batch: pa.RecordBatch) -> NDArray[np.uint64]:
        """Return the rows' random seeds: from the id column if there is one, else from the token ids. They never depend
        on a row's position in the table."""
        if self._spec.id_column is None:
            return row_seeds(self._spec.seed, keys_by_tokens(requests))
        ids = batch.column(self._spec.id_column).take(pa.array(requests.rows))
        return row_seeds(self._spec.seed, (b"id" + value for value in id_bytes(ids)))


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split a template like 'Title: {column}' into pairs (literal text, column or None); '{{' and '}}' are braces.

    Raises `UsageError` if braces hold anything but a column's name, or if no column is named.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"--prompt-template: {error}; write '{{{{' and '}}}}' for braces") from error
    for _, name, form, conversion in parts:
        if name is not None and (not name or form or conversion or any(sign in name for sign in ".[]")):
            raise UsageError(
                f"--prompt-template has {name!r} in braces; write a column's name alone, as in '{{column}}'"
            )
    if all(name is None for _, name, _, _ in parts):
        raise UsageError("--prompt-template names no column; write '{column}' where a row's text belongs")
    return [(literal, name) for literal, name, _, _ in parts]


def _parse_json(text: str) -> Any:
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadPrompt("invalid_utf8", "the messages hold half of a surrogate pair") from None
    except (ValueError, RecursionError):
        raise BadPrompt("bad_messages", "the messages are not JSON, or are nested too deep") from None
    return value


def _text_column(batch: pa.RecordBatch, name: str, errors: Errors) -> pa.Array:
    """Return the column as large_string, with null for each row that has an error. New errors are added to `errors`."""
    column = as_text(batch.column(name))
    for index in np.flatnonzero(column.is_null()).tolist():
        errors.setdefault(index, RowError("null_prompt", f"column {name!r} is null"))
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        for index, value in enumerate(column.cast(pa.large_binary())):
            try:
                str(value.as_py() or b"", "utf-8")
            except UnicodeDecodeError:
                errors.setdefault(index, _invalid_utf8(name))
    if not errors:
        return column
    bad = np.zeros(len(column), np.bool_)
    bad[list(errors)] = True
    return pc.if_else(pa.array(bad), pa.scalar(None, pa.large_string()), column)


def _good_texts(column: pa.Array, errors: Errors) -> tuple[NDArray[np.int64], list[str]]:
    """Return (indices, texts) of values that are not null, empty or too large; adds errors for empty and too large
    ones."""
    sizes = pc.fill_null(pc.binary_length(column), 0).to_numpy()
    for index, error in size_errors(sizes).items():
        errors.setdefault(index, error)
    indices = np.arange(len(column))
    if errors:
        indices = np.delete(indices, list(errors))
        column = column.take(pa.array(indices))
    return indices, column.to_pylist()


def _invalid_utf8(name: str) -> RowError:
    return RowError("invalid_utf8", f"column {name!r} is not UTF-8")


def _check_types(
    file: Path, schema: pa.Schema, names: list[str], fits: Callable[[pa.DataType], bool], expected: str
) -> None:
    for name in names:
        found = find_field(schema, name, file).type
        if not fits(found):
            raise Refused(f"{file}: column {name!r} is {found}; expected {expected}")


def _check_zones(file: Path, schema: pa.Schema, names: list[str]) -> None:
    for name in names:
        kind = schema.field(name).type
        if pa.types.is_timestamp(kind) and kind.tz is not None:
            try:
                as_text(pa.array([0], kind))
            except pa.ArrowInvalid as error:
                raise Refused(
                    f"{file}: column {name!r} has the time zone {kind.tz!r}, which this machine does not know; "
                    "install tzdata, or convert the column"
                ) from error


def _is_text(t: pa.DataType) -> bool:
    if pa.types.is_dictionary(t):
        t = t.value_type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(t) for test in tests)


def _is_scalar(t: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_temporal, pa.types.is_decimal)
    return _is_text(t) or any(test(t) for test in tests)


def _is_messages(t: pa.DataType) -> bool:
    if not (pa.types.is_list(t) or pa.types.is_large_list(t)):
        return _is_text(t)
    fields = {f.name: f.type for f in t.value_type} if pa.types.is_struct(t.value_type) else {}
    if any(getattr(kind, "unit", "") == "ns" for kind in fields.values()):  # Python's times have no nanoseconds
        return False
    return all(name in fields and _is_text(fields[name]) for name in ("role", "content"))


def _is_id(t: pa.DataType) -> bool:
    return _is_text(t) or pa.types.is_integer(t)
