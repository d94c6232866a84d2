"""The JSON Schema of `report.json`, made from the fields of `Report`.

python -m batchinfer.jobs.report_schema > docs/report.schema.json
"""

import json
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from batchinfer.jobs.report import SCHEMA_VERSION, Report

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SIMPLE = {int: "integer", float: "number", str: "string", bool: "boolean", NoneType: "null"}


def report_schema() -> dict[str, Any]:
    """Return the schema. A report of this version has every required field, and may have more."""
    schema = _of_class(Report)
    schema["properties"]["schema_version"] = {"const": SCHEMA_VERSION}
    return {"$schema": DIALECT, "title": "The report of a batchinfer job", **schema}


def _of_class(kind: type) -> dict[str, Any]:
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    return {
        "type": "object",
        "properties": {field.name: _of_type(hints[field.name]) for field in fields(kind)},
        "required": [field.name for field in fields(kind) if _required(field)],
    }


def _required(field: "Field[Any]") -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _of_type(kind: Any) -> dict[str, Any]:
    if kind is Any:
        return {}
    if kind in SIMPLE:
        return {"type": SIMPLE[kind]}
    if get_origin(kind) is UnionType:
        return {"anyOf": [_of_type(each) for each in get_args(kind)]}
    if get_origin(kind) is list:
        return {"type": "array", "items": _of_type(get_args(kind)[0])}
    if get_origin(kind) is dict:
        return {"type": "object", "additionalProperties": _of_type(get_args(kind)[1])}
    return _of_class(kind)


if __name__ == "__main__":
    print(json.dumps(report_schema(), indent=2))
