"""The result columns of answers that follow a flat JSON schema: one for each of its properties, of its type."""

import json
import math
from typing import Any

import pyarrow as pa

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import UsageError
from batchinfer.jobs.results.schema import PARSED_FIELDS, RESULT_FIELDS, SAMPLES
from batchinfer.jobs.results.score_columns import LOGPROBS, PROMPT_LOGPROBS
from batchinfer.jobs.structure_flags import StructureFlags
from batchinfer.text.json_schema import Schema, read_schema

TYPES = {"boolean": pa.bool_(), "integer": pa.int64(), "number": pa.float64(), "string": pa.string()}
KINDS = {bool: "boolean", int: "integer", float: "number", str: "string"}
OPTION = "--output-columns"


def structure_fields(flags: StructureFlags, sampling: SamplingParams) -> list[pa.Field]:
    """Return the columns that these flags ask for. Raises `UsageError` naming a property that fits no column."""
    if not flags.output_columns or sampling.json_schema is None:
        return []
    try:
        schema = read_schema(sampling.json_schema)
    except ValueError as error:
        raise UsageError(f"--json-schema {error}") from error
    properties = schema.get("properties")
    if schema.get("type", "object") != "object" or not properties:
        raise UsageError(f"{OPTION} needs a --json-schema of an object with properties; leave it out")
    taken = {SAMPLES, LOGPROBS, PROMPT_LOGPROBS, *(field.name for field in (*RESULT_FIELDS, *PARSED_FIELDS))}
    for name in properties:
        if name in taken:
            raise UsageError(
                f"{OPTION}: the schema has a property {name!r}, and the output has a column of that name; rename it, "
                "or leave the flag out"
            )
    return [pa.field(name, _type(name, each, schema)) for name, each in properties.items()]


def structure_columns(fields: list[pa.Field], texts: pa.Array, reasons: pa.Array) -> list[pa.Array]:
    """Return the columns `fields` of n answers; null where an answer was cut or failed, or lacks the property, and for
    a number beyond the column's type."""
    if not fields:
        return []
    pairs = zip(texts.to_pylist(), reasons.to_pylist(), strict=True)
    answers = [_read(text) if reason == "stop" else {} for text, reason in pairs]
    return [
        pa.array([_value(field.type, answer.get(field.name)) for answer in answers], field.type) for field in fields
    ]


def _type(name: str, schema: Any, whole: Schema) -> pa.DataType:
    schema = _meant(schema, whole)
    kinds = schema.get("type") if isinstance(schema, dict) else None
    kinds = set(kinds) if isinstance(kinds, list) else {kinds} if kinds else set()
    for values in (schema.get("enum"), [schema["const"]] if "const" in schema else None) if kinds == set() else ():
        kinds |= {KINDS.get(type(value), "null" if value is None else "?") for value in values or ()}
    kinds -= {"null"}
    if kinds == {"integer", "number"}:
        kinds = {"number"}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind == "array" and "prefixItems" not in schema and isinstance(schema.get("items"), dict):
        item = _meant(schema["items"], whole)
        if item.get("type") != "array":
            return pa.list_(_type(name, item, whole))
    if kind not in TYPES:
        raise UsageError(
            f"{OPTION}: property {name!r} is neither a text, a number or a boolean nor a list of one of these; leave "
            "the flag out, or make the schema flat"
        )
    return TYPES[kind]


def _meant(schema: Any, whole: Schema) -> Schema:
    """Return what a schema refers to, or its only alternative beside null."""
    for _ in range(10):
        if not isinstance(schema, dict):
            return {}
        others = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
        if "$ref" in schema:
            schema = _at(schema["$ref"], whole)
        elif len(others) == 1:
            schema = others[0]
        else:
            return schema
    return {}


def _at(reference: str, whole: Schema) -> Any:
    found: Any = whole
    for part in reference.removeprefix("#").removeprefix("/").split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _read(text: str | None) -> dict[str, Any]:
    try:
        answer = json.loads(text or "")
    except ValueError:  # a stop text has cut it
        return {}
    return answer if isinstance(answer, dict) else {}


def _value(kind: pa.DataType, value: Any) -> Any:
    if isinstance(value, list):
        return [_value(kind.value_type, each) for each in value]
    if value is None or (pa.types.is_int64(kind) and not -(2**63) <= value < 2**63):
        return None
    if pa.types.is_float64(kind):
        try:
            return float(value) if math.isfinite(value) else None
        except OverflowError:
            return None
    return value
