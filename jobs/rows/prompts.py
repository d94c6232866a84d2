"""Making token ids from the rows of a table, by a column, a template over columns, or messages; or a row's error."""

import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from batchinfer.engine.prompts import (
    Conversation,
    Errors,
    Tools,
    encode_chats,
    keys_by_tokens,
    row_seeds,
    those_that_fit,
)
from batchinfer.engine.request import Requests, RowError
from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.rows.conversations import (
    check_arguments_column,
    check_messages_column,
    check_tools_column,
    read_arguments,
    read_messages,
    read_tools,
    read_tools_file,
)
from batchinfer.jobs.rows.labels import LabelSource
from batchinfer.jobs.rows.sampling import SamplingSource
from batchinfer.jobs.rows.schemas import SchemaSource
from batchinfer.jobs.rows.scored_texts import CompletionSource, whole_texts
from batchinfer.jobs.rows.text_columns import check_types, good_texts, is_text, text_column
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.ids import as_text, id_bytes
from batchinfer.jobs.tables.json_lines import indices_not_text
from batchinfer.text.chat_arguments import Arguments
from batchinfer.text.tokenizer import Offsets, TokenIds, Tokenizer


def verbatim_columns(spec: JobSpec) -> list[str]:
    """Return the columns in which each row's value must stay as the row wrote it, since prompts are made of it.

    A prompt column has no other values than text. Raises `UsageError` for a wrong prompt template.
    """
    template = [] if spec.prompt_template is None else parse_template(spec.prompt_template)
    of_chats = spec.messages_column, spec.tools_column, spec.chat_template_kwargs_column
    names = [*of_chats, spec.json_schema_column, spec.sampling_params_column, *(name for _, name in template)]
    return [name for name in names if name is not None]


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
            names = template_columns(spec.prompt_template, file, schema)
        elif spec.messages_column is not None:
            names = [spec.messages_column]
            check_messages_column(file, schema, spec.messages_column)
        else:
            names = [spec.text_column or spec.prompt_column or "prompt"]
            _check_text_column(file, schema, names[0])
        if spec.tools_column is not None:
            check_tools_column(file, schema, spec.tools_column)
            names.append(spec.tools_column)
        self._tools = None if spec.tools is None else read_tools_file(spec.tools)
        if spec.chat_template_kwargs_column is not None:
            check_arguments_column(file, schema, spec.chat_template_kwargs_column)
            names.append(spec.chat_template_kwargs_column)
        if spec.id_column is not None:
            check_types(file, schema, [spec.id_column], _is_id, "text or an integer")
            names.append(spec.id_column)
        self._labels = LabelSource(spec, tokenizer, max_model_len, schema) if spec.chooses else None
        column = spec.json_schema_column
        self._schemas = None if column is None else SchemaSource(spec, column, schema)
        self._completions = None
        if spec.completion_column is not None:
            self._completions = CompletionSource(spec, spec.completion_column, tokenizer, max_model_len, schema)
            names.append(spec.completion_column)
        names += [*(self._labels.columns if self._labels else []), *([] if column is None else [column])]
        column = spec.sampling_params_column
        self._sampling = None if column is None else SamplingSource(spec, column, tokenizer, schema)
        names += [] if column is None else [column]
        self.columns = list(dict.fromkeys(names))
        if spec.renders_chats and tokenizer.template is None:
            raise Refused(
                f"{spec.tokenizer or spec.model} has no chat template; give one with --chat-template, a tokenizer that "
                "has one with --tokenizer, or plain prompts with --prompt-column"
            )

    def tokenize(self, first_row: int, batch: pa.RecordBatch) -> tuple[Requests, dict[int, RowError]]:
        """Return requests for the rows that can run, in table order, and the errors of the other rows, by ordinal."""
        errors: Errors = {}
        if self._spec.messages_column is not None:
            chats = {
                index: messages if messages[0]["role"] == "system" else [*self._system, *messages]
                for index, messages in read_messages(batch, self._spec.messages_column, errors).items()
            }
            indices, token_ids, offsets = self._encode(chats, batch, errors)
        else:
            templated = self._spec.prompt_template is not None
            column = rendered(self._template, batch, errors) if templated else self._plain(batch, errors)
            indices, texts = good_texts(column, errors)
            if self._spec.chat:
                chats = {
                    index: [*self._system, {"role": "user", "content": text}]
                    for index, text in zip(indices.tolist(), texts, strict=True)
                }
                indices, token_ids, offsets = self._encode(chats, batch, errors)
            else:
                token_ids, offsets = self._tokenizer.encode_batch(texts, self._spec.allow_special_tokens)

        requests = Requests.alike(indices, token_ids, offsets, self._spec.sampling)
        if self._spec.text_column is not None:
            fit = whole_texts(requests, texts, self._max_model_len, errors)
            return replace(fit, rows=first_row + fit.rows), {first_row + i: e for i, e in sorted(errors.items())}
        seeds: dict[int, int] = {}
        if self._spec.lists_samples:
            requests = replace(requests, samples=np.full(len(indices), self._spec.n, np.int32))
        if self._sampling is not None:
            requests, seeds = self._sampling.sampled(requests, batch, errors)
        requests = those_that_fit(requests, self._max_model_len, errors)
        if self._completions is not None:
            requests = self._completions.scored(requests, batch, errors)
        if self._labels is not None:
            requests = self._labels.choosing(requests, batch, errors)
        if self._schemas is not None:
            requests = self._schemas.following(requests, batch, errors)
        if (requests.number("temperature") > 0).any():
            requests = replace(requests, seeds=self._seeds(requests, batch, seeds))
        by_row = {first_row + index: error for index, error in sorted(errors.items())}
        return replace(requests, rows=first_row + requests.rows), by_row

    def _plain(self, batch: pa.RecordBatch, errors: Errors) -> pa.Array:
        name = self.columns[0]
        for index in indices_not_text(batch, name):
            errors[index] = RowError("wrong_type", f"column {name!r} holds a value that is not text")
        return text_column(batch, name, errors)

    def _encode(
        self, chats: dict[int, Conversation], batch: pa.RecordBatch, errors: Errors
    ) -> tuple[NDArray[np.int64], TokenIds, Offsets]:
        """Return (indices, token ids, offsets) of the conversations, by index, whose tools and arguments are good."""
        spec = self._spec
        tools: dict[int, Tools | None] = dict.fromkeys(chats, self._tools)
        if spec.tools_column is not None:
            tools = read_tools(batch, spec.tools_column, errors)
        common: Arguments = spec.chat_template_kwargs or {}
        arguments = dict.fromkeys(chats, common)
        if spec.chat_template_kwargs_column is not None:
            given = read_arguments(batch, spec.chat_template_kwargs_column, errors)
            arguments = {index: {**common, **own} for index, own in given.items()}
        good = [index for index in chats if index in tools and index in arguments]
        indices = np.array(good, np.int64)
        messages, offered = [chats[index] for index in good], [tools[index] for index in good]
        each = [arguments[index] for index in good]
        special = spec.allow_special_tokens
        return indices, *encode_chats(self._tokenizer, indices, messages, errors, offered, special, each)

    def _seeds(self, requests: Requests, batch: pa.RecordBatch, own: dict[int, int]) -> NDArray[np.uint64]:
        """Return the rows' random seeds: from the id column if there is one, else from the token ids, and from the seed
        that a row has of its `own` or the job's. They never depend on a row's position in the table."""
        given = [own.get(index, self._spec.seed) for index in requests.rows.tolist()]
        if self._spec.id_column is None:
            return row_seeds(given, keys_by_tokens(requests))
        ids = as_text(batch.column(self._spec.id_column)).take(pa.array(requests.rows))  # pyarrow takes no string views
        return row_seeds(given, [b"id" + value for value in id_bytes(ids)])


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
                f"--prompt-template has {name!r} in braces; write a column's name alone, as in '{{column}}'; rename a "
                "column that has one of . : ! [ ] in its name"
            )
    if all(name is None for _, name, _, _ in parts):
        raise UsageError("--prompt-template names no column; write '{column}' where a row's text belongs")
    return [(literal, name) for literal, name, _, _ in parts]


def _check_text_column(file: Path, schema: pa.Schema, name: str) -> None:
    """Raise `Refused` as `check_types` does, and say which flags name prompts if the table lacks the usual column."""
    try:
        check_types(file, schema, [name], is_text, "text")
    except Refused as error:
        if name != "prompt" or name in schema.names:
            raise
        flags = "--prompt-column, --prompt-template or --messages-column"
        batch = ", or give --openai-batch for a batch file of OpenAI" if "custom_id" in schema.names else ""
        raise Refused(f"{error}; say with {flags} where prompts come from{batch}") from error


def fits_template(column: str) -> bool:
    """Return whether a prompt template can name this column."""
    try:
        return parse_template(f"{{{column}}}") == [("", column)]
    except UsageError:
        return False


def template_columns(template: str, file: Path, schema: pa.Schema) -> list[str]:
    """Return the names in a template's braces, in its order. Raises `Refused`, naming file and column, if a column is
    missing or its type does not fit, and `UsageError` as `parse_template` does."""
    names = [name for _, name in parse_template(template) if name is not None]
    check_types(file, schema, names, _is_scalar, "text, a number, a boolean or a date")
    _check_zones(file, schema, names)
    return names


def rendered(template: list[tuple[str, str | None]], batch: pa.RecordBatch, errors: Errors) -> pa.Array:
    """Return the text that a parsed template makes of each row, null for rows with an error. Adds new errors."""
    parts: list[Any] = []
    for literal, name in template:
        parts.append(pa.scalar(literal, pa.large_string()))
        if name is not None:
            parts.append(text_column(batch, name, errors))
    return pc.binary_join_element_wise(*parts, pa.scalar("", pa.large_string()))


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


def _is_scalar(t: pa.DataType) -> bool:
    # No lengths of time: their text would be the stored number, which does not say its unit.
    times = (pa.types.is_date, pa.types.is_time, pa.types.is_timestamp)
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, *times)
    return is_text(t) or isinstance(t, pa.UuidType) or any(test(t) for test in tests)


def _is_id(t: pa.DataType) -> bool:
    return is_text(t) or pa.types.is_integer(t) or isinstance(t, pa.UuidType)
