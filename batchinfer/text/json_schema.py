"""The JSON schemas that answers can be made to follow: which keywords are enforced, and how a schema is prepared.

llguidance refuses most keywords that it does not implement, but passes over those that it does not know, and enforces a
few only nearly. Here every keyword is listed that holds for every answer; any other is refused by name and path.
"""

import json
import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

SCHEMA = ("items", "additionalProperties")  # their value is a schema,
SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")  # a list of schemas,
NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")  # or schemas by name
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
PLAIN = (
    *("type", "enum", "const", "pattern", "format", "required", "$ref"),
    *("minLength", "maxLength", "minItems", "maxItems", "maxProperties"),
)
# These say something about values and allow or forbid none.
NOTES = (
    *("title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly"),
    *("$schema", "$id", "$anchor"),
)
KNOWN = frozenset((*SCHEMA, *SCHEMAS, *NAMED_SCHEMAS, *NUMBERS, *PLAIN, *NOTES))
REMEDIES = {
    "nullable": 'write "type": [..., "null"] instead',
    "minProperties": 'list what must be there under "required" instead',
    "additionalItems": 'write "prefixItems" for the first items, and "items" for the others',
}
MOST_EXACT = 2**53  # up to here, all whole numbers are exact as the floating-point numbers that bounds are read as

Schema = dict[str, Any]


def read_schema(text: str) -> Schema:
    """Parse a JSON schema. Objects without `additionalProperties` get only the keys that their schema names.

    Raises `ValueError` saying what is wrong, and for a keyword that would not be enforced naming it and its path.
    """
    try:
        schema = json.loads(text, parse_constant=_no_number)
        if not isinstance(schema, dict):
            raise ValueError("is not a JSON object")
        subschemas = list(_walk(schema, "#"))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    for path, each in subschemas:
        _check(path, each)
    if not any(_combines(each) for _, each in subschemas):
        for _, each in subschemas:
            _close(each)
    return schema


def _no_number(name: str) -> None:
    raise ValueError(f"is not JSON: it holds {name}")


def _walk(schema: Any, path: str) -> Iterator[tuple[str, Schema]]:
    """Yield a schema and all schemas in it, with their paths; those that are true or false are left out."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ValueError(f"has {_kind(schema)} where a schema belongs, at {path}")
    yield path, schema
    for key, value in schema.items():
        at = f"{path}/{key}"
        if key in SCHEMA:
            yield from _walk(value, at)
        elif key in SCHEMAS:
            _expect(list, value, at)
            yield from chain.from_iterable(_walk(each, f"{at}/{i}") for i, each in enumerate(value))
        elif key in NAMED_SCHEMAS:
            _expect(dict, value, at)
            yield from chain.from_iterable(_walk(each, f"{at}/{name}") for name, each in value.items())


def _expect(kind: type, value: Any, at: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"has {_kind(value)} at {at}; expected {_kind(kind())}")


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number")


def _check(path: str, schema: Schema) -> None:
    for key, value in schema.items():
        at = f"{path}/{key}"
        if key not in KNOWN:
            remedy = REMEDIES.get(key, "leave it out, or say it with keywords that docs/answers.md lists")
            raise ValueError(f"has the keyword {key!r} at {at}, which is not enforced on answers: {remedy}")
        if key == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            raise ValueError(f"has a reference at {at} to something outside: put what it names under '$defs'")
        if key in NUMBERS:
            exact = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST_EXACT
            if not exact or math.isnan(value):
                raise ValueError(f"has {str(value)[:30]} at {at}; it must be a number from -2^53 to 2^53")
    if "enum" in schema:
        _expect(list, schema["enum"], f"{path}/enum")
    if "required" in schema:
        _expect(list, schema["required"], f"{path}/required")
        for name in schema["required"]:
            _expect(str, name, f"{path}/required")
    if any(map(ends_open, _texts([schema.get("pattern"), *schema.get("patternProperties", ())]))):
        raise ValueError(f"has a pattern at {path} that ends in a backslash with nothing behind it; complete it")
    written = [*schema.get("properties", ()), schema.get("const"), *schema.get("enum", ())]
    if any(_unwritable(text) for text in _texts(written)):
        raise ValueError(f"has a text at {path} with a control character that answers never hold; leave it out")


def ends_open(pattern: str) -> bool:
    """Return whether a regular expression ends in a backslash that escapes nothing; llguidance would drop it."""
    return (len(pattern) - len(pattern.rstrip("\\"))) % 2 == 1


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        inside = chain(value, value.values()) if isinstance(value, dict) else iter(value)
        yield from chain.from_iterable(map(_texts, inside))


def _unwritable(text: str) -> bool:
    """Return whether JSON can write this text only with \\u, which answers do not use: it could hide a key's name."""
    return any((ord(c) < 32 and c not in "\b\f\n\r\t") or ord(c) == 127 for c in text)


def _combines(schema: Schema) -> bool:
    """Return whether properties of one object come from several schemas, so that none of these may be closed."""
    beside = "properties" in schema and any(key in schema for key in ("$ref", "anyOf", "oneOf"))
    return "allOf" in schema or beside


def _close(schema: Schema) -> None:
    named = schema.get("properties", {})
    if named and "patternProperties" not in schema and set(schema.get("required", ())) <= set(named):
        schema.setdefault("additionalProperties", False)
