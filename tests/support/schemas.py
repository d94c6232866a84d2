"""Thirty small JSON schemas of the shapes that APIs have."""

from typing import Any

TEXT: dict[str, Any] = {"type": "string", "maxLength": 8}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 99}


def record(required: str = "", **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split()}


SCHEMAS: dict[str, dict[str, Any]] = {
    "weather tool": record("city unit", city=TEXT, unit={"enum": ["celsius", "fahrenheit"]}),
    "search tool": record("query", query=TEXT, limit={"type": "integer", "minimum": 1, "maximum": 50}),
    "one of two tools": {
        "anyOf": [
            record("name city", name={"const": "weather"}, city=TEXT),
            record("name a b", name={"const": "add"}, a=COUNT, b=COUNT),
        ]
    },
    "sentiment": record("label", label={"enum": ["positive", "negative", "neutral"]}, sure={"type": "boolean"}),
    "score": record("score", score={"type": "number", "minimum": 0, "maximum": 1}),
    "open interval": record("x", x={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 2.5}),
    "steps of five": record("n", n={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500}),
    "person": record("name age", name=TEXT, age=COUNT, email={"type": ["string", "null"], "maxLength": 5}),
    "invoice": record(
        "id lines total",
        id={"type": "string", "pattern": "^INV-[0-9]{4}$"},
        lines={"type": "array", "items": record("sku n", sku=TEXT, n=COUNT), "minItems": 1, "maxItems": 2},
        total={"type": "number", "minimum": 0, "maximum": 999},
    ),
    "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
    "pair": {"type": "array", "prefixItems": [TEXT, COUNT], "items": False, "minItems": 2},
    "first, then numbers": {"type": "array", "prefixItems": [TEXT], "items": COUNT, "maxItems": 3},
    "matrix": {
        "type": "array",
        "items": {"type": "array", "items": COUNT, "minItems": 2, "maxItems": 2},
        "minItems": 2,
        "maxItems": 2,
    },
    "optional fields alone": record(a=COUNT, b={"type": "boolean"}, c={"type": "null"}),
    "nested": record(
        "user",
        user=record("name address", name=TEXT, address=record("zip", zip={"pattern": "^[0-9]{5}$", "type": "string"})),
    ),
    "map of counts": {"type": "object", "additionalProperties": COUNT, "maxProperties": 2},
    "prefixed keys": {
        "type": "object",
        "patternProperties": {"^x_[a-z]{1,3}$": COUNT},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "named, and others": {
        "type": "object",
        "properties": {"id": COUNT},
        "required": ["id"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 3,
    },
    "date": record("on", on={"type": "string", "format": "date"}),
    "date and time": record("at", at={"type": "string", "format": "date-time"}),
    "uuid": record("id", id={"type": "string", "format": "uuid"}),
    "address": record("ip", ip={"type": "string", "format": "ipv4"}),
    "email": record("to", to={"type": "string", "format": "email", "maxLength": 20}),
    "as pydantic writes it": {
        "$defs": {"Color": {"enum": ["red", "blue"], "title": "Color", "type": "string"}},
        "title": "Thing",
        **record(
            "color",
            color={"$ref": "#/$defs/Color"},
            size={"anyOf": [COUNT, {"type": "null"}], "default": None, "title": "Size"},
        ),
    },
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": record("v", v=COUNT, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}),
        },
    },
    "all of two": {
        "allOf": [record("a", a=COUNT), record("b", b={"type": "boolean"})],
        "maxProperties": 2,
        "required": ["a", "b"],
    },
    "one of": {"oneOf": [{"type": "boolean"}, {"type": "null"}, COUNT]},
    "constant": {"const": {"status": "ok", "code": [0, None, '\u00e9"\\']}},
    "lengths": record("code", code={"type": "string", "minLength": 3, "maxLength": 3}),
    "older draft": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"n": COUNT},
        **record("n", n={"$ref": "#/definitions/n"}),
    },
}
