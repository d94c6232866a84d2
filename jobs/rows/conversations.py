"""Reading conversations, their tools, and arguments for their template from columns or files; or a row's error."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchinfer.engine.prompts import (
    BadPrompt,
    Conversation,
    Errors,
    Tools,
    check_arguments,
    check_messages,
    check_tools,
    size_errors,
)
from batchinfer.errors import Refused
from batchinfer.jobs.rows.text_columns import invalid_utf8, is_text
from batchinfer.jobs.tables.ids import as_text
from batchinfer.jobs.tables.table import find_field
from batchinfer.text.chat_arguments import Arguments


def check_messages_column(file: Path, schema: pa.Schema, name: str) -> None:
    """Raise `Refused`, naming the type that was found, unless the column can hold conversations."""
    kind = find_field(schema, name, file).type
    if is_text(kind):
        return
    fields = _fields(kind)
    if not {"role", "content"} <= fields.keys() or not is_text(fields["role"]) or _has_nanoseconds(kind):
        raise Refused(
            f"{file}: column {name!r} is {kind}; expected a list of {{role, content}} without times in nanoseconds, or "
            "its JSON as text"
        )
    content = fields["content"]
    if not is_text(content) and not is_text(_fields(content).get("type", pa.bool_())):
        what = f"a list of {content.value_type}" if _is_list(content) else str(content)
        raise Refused(
            f"{file}: column {name!r} has messages whose content is {what}; expected text, or a list of parts "
            "{type, text}"
        )


def check_tools_column(file: Path, schema: pa.Schema, name: str) -> None:
    """Raise `Refused`, naming the type that was found, unless the column can hold tools."""
    kind = find_field(schema, name, file).type
    if not is_text(kind) and (not _fields(kind) or _has_nanoseconds(kind)):
        raise Refused(
            f"{file}: column {name!r} is {kind}; expected a list of structs without times in nanoseconds, or its JSON "
            "as text"
        )


def check_arguments_column(file: Path, schema: pa.Schema, name: str) -> None:
    """Raise `Refused`, naming the type that was found, unless the column can hold arguments for a chat template, or
    other objects."""
    kind = find_field(schema, name, file).type
    is_map = pa.types.is_map(kind) and is_text(kind.key_type)
    if not (is_text(kind) or is_map or pa.types.is_struct(kind)) or _has_nanoseconds(kind):
        raise Refused(
            f"{file}: column {name!r} is {kind}; expected structs, or maps with text as keys, without times in "
            "nanoseconds, or JSON objects as text"
        )


def read_tools_file(file: Path) -> Tools:
    """Return the tools in a JSON file. Raises `Refused`, naming the file, if it holds no list of tools."""
    try:
        tools = _parse_json(file.read_text("utf-8"), "tools")
        check_tools(tools)
        if not tools:
            raise BadPrompt("bad_tools", "there is no tool in it")
    except UnicodeDecodeError as error:
        raise Refused(f"--tools {file} is not UTF-8: {error}") from error
    except OSError as error:
        raise Refused(f"--tools {file}: {error.strerror}; correct the path") from error
    except BadPrompt as error:
        raise Refused(
            f"--tools {file}: {error.row_error.message}; give a JSON list of schemas, as "
            '[{"type": "function", "function": {"name": ..., "parameters": ...}}]'
        ) from error
    return list(tools)


def read_messages(batch: pa.RecordBatch, name: str, errors: Errors) -> dict[int, Conversation]:
    """Return the conversations by index. New errors are added to `errors`."""
    return _read(batch.column(name), name, "messages", check_messages, errors)


def read_tools(batch: pa.RecordBatch, name: str, errors: Errors) -> dict[int, Tools | None]:
    """Return the tools by index; a null and an empty text are none. New errors are added to `errors`."""
    return _read(_empty_as_null(batch.column(name)), name, "tools", check_tools, errors)


def read_arguments(batch: pa.RecordBatch, name: str, errors: Errors) -> Mapping[int, Arguments]:
    """Return the arguments for the chat template by index. New errors are added to `errors`."""
    return read_objects(batch, name, "chat_template_kwargs", check_arguments, errors)


def read_objects(
    batch: pa.RecordBatch, name: str, what: str, check: Callable[[Any], None], errors: Errors
) -> dict[int, dict[str, Any]]:
    """Return the objects in a column by index. A null and an empty text are empty objects, and a null in a struct or a
    map is left out. `check` raises `BadPrompt` for what is no object. New errors, about `what`, are added to `errors`.
    """
    column = _empty_as_null(batch.column(name))
    found = _read(column, name, what, check, errors)
    sparse = not is_text(column.type)  # all rows of a struct have the same fields
    return {
        index: {key: value for key, value in (given or {}).items() if not (sparse and value is None)}
        for index, given in found.items()
    }


def _empty_as_null(column: pa.Array) -> pa.Array:
    if not is_text(column.type):
        return column
    column = as_text(column)
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)  # CSV has no nulls


def _read(column: pa.Array, name: str, what: str, check: Callable[[Any], None], errors: Errors) -> dict[int, Any]:
    """Return the values by index, with text read as JSON, that have no error and pass `check`."""
    if is_json := is_text(column.type):
        column = as_text(column)
        sizes = pc.fill_null(pc.binary_length(column), 1).to_numpy()
        for index, error in size_errors(sizes).items():
            errors.setdefault(index, error)
    found = {}
    for index, stored in enumerate(column):
        if index in errors:
            continue
        try:
            value = stored.as_py()
            if isinstance(stored, pa.MapScalar) and value is not None:
                value = dict(value)
            if is_json and value is not None:
                value = _parse_json(value, what)
            check(value)
        except BadPrompt as error:
            errors[index] = error.row_error
        except UnicodeDecodeError:
            errors[index] = invalid_utf8(name)
        else:
            found[index] = value
    return found


def _parse_json(text: str, what: str) -> Any:
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadPrompt("invalid_utf8", f"the {what} hold half of a surrogate pair") from None
    except (ValueError, RecursionError):
        raise BadPrompt(f"bad_{what}", f"the {what} are not JSON, or are nested too deep") from None
    return value


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _fields(kind: pa.DataType) -> dict[str, pa.DataType]:
    """Return the types of the fields in a list of structs; none for another type."""
    if not _is_list(kind) or not pa.types.is_struct(kind.value_type):
        return {}
    return {field.name: field.type for field in kind.value_type}


def _has_nanoseconds(kind: pa.DataType) -> bool:
    """Return whether values may hold times that Python's own types cannot."""
    inner = (kind.field(i).type for i in range(kind.num_fields))
    return getattr(kind, "unit", "") == "ns" or any(map(_has_nanoseconds, inner))
