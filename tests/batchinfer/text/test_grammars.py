"""Grammars: what is refused, and that what is not refused holds for every answer; jsonschema is the judge."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from chat_models import CHATML, save
from gguf_models import byte_level
from llguidance import LLMatcher, LLTokenizer
from schemas import SCHEMAS
from tokenizers import decoders, models, normalizers

from batchinfer.text.grammars import _bytes, check_grammar, compiled, error_of, matcher, refuse_tokenizer, token_bytes
from batchinfer.text.json_schema import KNOWN, NOTES, read_schema
from batchinfer.text.tokenizer import Tokenizer

CHECKER = jsonschema.FormatChecker(["email", "ipv4", "uuid"])  # days of months are the one thing that is not held to


def allowed(found: LLMatcher) -> list[int]:
    bits = np.frombuffer(found.compute_bitmask(), np.uint8)
    return np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()


def follows(schema: dict[str, Any], text: str) -> bool:
    found = matcher(_bytes(), compiled(("json_schema", json.dumps(schema))))
    assert not error_of(found)
    written = list(text.encode())
    return found.try_consume_tokens(written) == len(written) and found.is_accepting()


def walk(schema: dict[str, Any], rng: np.random.Generator) -> str:
    """An answer of random bytes among those allowed; ends, quotes and brackets that close come often."""
    found = matcher(_bytes(), compiled(("json_schema", json.dumps(schema))))
    text = bytearray()
    while not found.is_stopped() and len(text) < 2000:
        tokens = allowed(found)
        likely = [token for token in tokens if token in (256, *b'"}],')]
        token = int(rng.choice(likely if likely and rng.random() < 0.4 else tokens))
        if token == 256:
            break
        assert found.consume_token(token)
        text.append(token)
    assert found.is_accepting()
    return text.decode()


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_a_grammar_allows_the_schema_allows(name: str) -> None:
    check_grammar(("json_schema", json.dumps(SCHEMAS[name])))
    judge = jsonschema.validators.validator_for(SCHEMAS[name], jsonschema.Draft202012Validator)
    rng = np.random.default_rng(0)
    answers = {walk(SCHEMAS[name], rng) for _ in range(25)}
    for answer in answers:
        judge(SCHEMAS[name], format_checker=CHECKER).validate(json.loads(answer))
    assert len(answers) > 1 or name == "constant"


# Each keyword that is enforced: a schema, an answer that it allows, and one that only this keyword forbids.
OBJECT, LIST, TEXT, WHOLE = {"type": "object"}, {"type": "array"}, {"type": "string"}, {"type": "integer"}
KEYWORDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "type": (WHOLE, "1", '"a"'),
    "enum": ({"enum": [1, "a"]}, '"a"', '"b"'),
    "const": ({"const": {"a": [1]}}, '{"a": [1]}', '{"a": [2]}'),
    "minimum": ({**WHOLE, "minimum": 17}, "17", "16"),
    "maximum": ({**WHOLE, "maximum": 17}, "17", "18"),
    "exclusiveMinimum": ({"type": "number", "exclusiveMinimum": 1.5}, "1.6", "1.5"),
    "exclusiveMaximum": ({"type": "number", "exclusiveMaximum": 1.5}, "1.4", "1.5"),
    "multipleOf": ({**WHOLE, "multipleOf": 7}, "21", "22"),
    "minLength": ({**TEXT, "minLength": 2}, '"\u00e9\\n"', '"\u00e9"'),
    "maxLength": ({**TEXT, "maxLength": 2}, '"\u00e9\\n"', '"\u00e9\\na"'),
    "pattern": ({**TEXT, "pattern": "b[0-9]"}, '"ab1c"', '"abc"'),
    "format": ({**TEXT, "format": "ipv4"}, '"10.0.0.255"', '"10.0.0.256"'),
    "required": ({**OBJECT, "properties": {"a": WHOLE}, "required": ["a"]}, '{"a": 1}', "{}"),
    "properties": ({**OBJECT, "properties": {"a": WHOLE}}, '{"a": 1}', '{"a": "x"}'),
    "patternProperties": ({**OBJECT, "patternProperties": {"^x": WHOLE}}, '{"x1": 1}', '{"x1": "x"}'),
    "additionalProperties": (
        {**OBJECT, "properties": {"a": WHOLE}, "additionalProperties": WHOLE},
        '{"a": 1, "b": 1}',
        '{"a": 1, "b": "x"}',
    ),
    "maxProperties": ({**OBJECT, "maxProperties": 1}, '{"a": 1}', '{"a": 1, "b": 2}'),
    "items": ({**LIST, "items": WHOLE}, "[1, 2]", '[1, "a"]'),
    "prefixItems": ({**LIST, "prefixItems": [TEXT, WHOLE]}, '["a", 1]', '["a", "b"]'),
    "minItems": ({**LIST, "minItems": 2}, "[1, 2]", "[1]"),
    "maxItems": ({**LIST, "maxItems": 2}, "[1, 2]", "[1, 2, 3]"),
    "anyOf": ({"anyOf": [WHOLE, TEXT]}, '"a"', "true"),
    "oneOf": ({"oneOf": [WHOLE, TEXT]}, '"a"', "true"),
    "allOf": ({"allOf": [{**WHOLE, "minimum": 3}, {"maximum": 5}]}, "4", "6"),
    "$ref": ({"$ref": "#/$defs/a", "$defs": {"a": WHOLE}}, "4", '"a"'),
    "$defs": ({"$ref": "#here", "$defs": {"a": {**WHOLE, "$anchor": "here"}}}, "4", '"a"'),
    "definitions": ({"$ref": "#/definitions/a", "definitions": {"a": WHOLE}}, "4", '"a"'),
}


def test_every_keyword_that_is_taken_is_enforced() -> None:
    assert KEYWORDS.keys() == KNOWN - set(NOTES)
    for keyword, (schema, good, bad) in KEYWORDS.items():
        judge = jsonschema.Draft202012Validator(schema, format_checker=CHECKER)
        assert judge.is_valid(json.loads(good)) and not judge.is_valid(json.loads(bad)), keyword
        assert follows(schema, good) and not follows(schema, bad), keyword


def test_a_key_has_one_way_of_being_written() -> None:
    """Otherwise a key that is not named could be one that is."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True}
    assert follows(schema, '{"b": "x"}') and not follows(schema, '{"\\u0061": "x"}')


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        ({"properties": {"a": {}}}, True),
        ({"properties": {"a": {}}, "additionalProperties": True}, False),
        ({"properties": {"a": {}}, "required": ["b"]}, False),
        ({"type": "object"}, False),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, False),
        ({"properties": {"a": {}}, "anyOf": [{"required": ["b"]}, {"required": ["a"]}]}, False),
        ({"anyOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, True),
    ],
)
def test_objects_have_the_keys_that_are_named(schema: dict[str, Any], closed: bool) -> None:
    assert ('"additionalProperties": false' in json.dumps(read_schema(json.dumps(schema)))) == closed
    assert follows({"type": "object", **schema}, '{"a": 1, "b": 2}') == (not closed)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({**LIST, "uniqueItems": True}, "'uniqueItems' at #/uniqueItems, which is not enforced"),
        ({"properties": {"a": {"items": {"nullable": True}}}}, "'nullable' at #/properties/a/items/nullable"),
        ({"anyOf": [WHOLE, {"not": TEXT}]}, "'not' at #/anyOf/1/not"),
        ({**OBJECT, "minProperties": 1}, "'minProperties' at #/minProperties"),
        ({"x-guidance": {"lenient": True}}, "'x-guidance'"),
        ({"$dynamicRef": "#a"}, r"'\$dynamicRef'"),
        ({"$ref": "https://example.com/a.json"}, r"reference at #/\$ref to something outside"),
        ({"$ref": "#/$defs/a"}, "does not exist"),
        ({"$ref": "#"}, "allows no answer"),
        ({"type": "text"}, "Invalid type: text"),
        ({"format": "colour", **TEXT}, "Unknown format: colour"),
        ({**TEXT, "pattern": "(?=a)"}, "look-around"),
        ({**TEXT, "pattern": "(a"}, "unclosed group"),
        ({**WHOLE, "minimum": 5, "maximum": 3}, "minimum .5. is greater than maximum .3."),
        ({**WHOLE, "minimum": 2**53 + 1}, r"at #/minimum; it must be a number from -2\^53"),
        ({**WHOLE, "minimum": 1, "exclusiveMinimum": True}, "has True at #/exclusiveMinimum"),
        ({"oneOf": [WHOLE, {"type": "number"}]}, "oneOf"),
        ({"enum": ["\x01"]}, "control character"),
        ({"properties": []}, "has a list at #/properties; expected an object"),
        ({"items": [WHOLE]}, "has a list where a schema belongs, at #/items"),
        ({"required": "a"}, "has a text at #/required; expected a list"),
        ({"enum": 3}, "has a number at #/enum; expected a list"),
        ({"items": {"pattern": "a\\"}}, "has a pattern at #/items that ends in a backslash"),
        ({"patternProperties": {"a\\": WHOLE}}, "has a pattern at # that ends in a backslash"),
    ],
)
def test_what_would_not_hold_is_refused(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_grammar(("json_schema", json.dumps(schema)))


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("json_schema", "{", "is not JSON"),
        ("json_schema", "[]", "is not a JSON object"),
        ("json_schema", '{"minimum": NaN}', "holds NaN"),
        ("json_schema", '{"items":' * 9000 + "{}" + "}" * 9000, "nested too deeply"),
        ("json_schema", '{"title": "' + "a" * (1 << 18) + '"}', "longer than 262,144 bytes"),
        ("regex", "(a", "unclosed group"),
        ("regex", "", "is empty"),
        ("regex", "ab\\", "ends in a backslash"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", r"[^\s\S]", "allows no answer"),
        ("regex", "(a{1000}){1000}", "cannot be followed: lexer error"),
        ("regex", "\ud800", "half of a surrogate pair"),
        ("grammar", "start: foo", 'unknown name: "foo"'),
        ("grammar", "start: start", "allows no answer"),
        ("grammar", 'start: "a" start', "Too many items"),
        ("grammar", "", "Empty grammar"),
        ("grammar", "{}", "is JSON"),
        ("grammar", 'start: %json {"type": "integer"}', "'%json', which is not enforced"),
        ("grammar", "start[temperature=0.5]: /a+/", "'temperature=', which is not enforced"),
        ("grammar", "start: <|im_end|>", "unknown special token"),
    ],
)
def test_grammars_that_cannot_be_followed_are_refused_soon(kind: str, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_grammar((kind, text))


def sentence_piece() -> tokenizers.Tokenizer:
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        *'ab{":}',
        "ab",
        "\u2581ab",
        "\u2581{",
    ]
    pairs = [("a", "b"), ("\u2581", "ab"), ("\u2581", "{")]
    made = tokenizers.Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def saved(folder: Path, made: str) -> Tokenizer:
    """A tokenizer of each kind, with two ends of text."""
    if made in ("chat", "metaspace"):
        tokenizer = Tokenizer.load(save(folder, CHATML, sentence_piece=made == "metaspace"))
        return Tokenizer(tokenizer._backend, eos_ids=(2, 3))
    backend = sentence_piece() if made == "llama" else byte_level(made)
    return Tokenizer(backend, eos_ids=(2, 3) if made == "llama" else (1, 5))


@pytest.mark.parametrize("made", ["chat", "metaspace", "llama", "gpt-2", "llama-bpe", "qwen2"])
def test_every_kind_of_tokenizer_follows_a_grammar(tmp_path: Path, made: str) -> None:
    """The decoded text is what the grammar says, whatever allowed tokens are drawn; either end may end it."""
    tokenizer = saved(tmp_path, made)
    size = tokenizer.vocab_size + 3  # a model may have more
    tokens: LLTokenizer = token_bytes(tokenizer, size)
    grammar = compiled(("regex", r'\{"ab": (a|b| |\u00e9|\u65e5){3}\}'))
    rng = np.random.default_rng(0)
    for _ in range(10):
        found, answer = matcher(tokens, grammar), list[int]()
        while (choice := allowed(found)) != list(tokenizer.eos_ids):
            forced = found.compute_ff_tokens()
            assert not forced or choice == forced[:1], "a forced token is the only one that is allowed"
            answer.append(int(rng.choice(choice)))
            assert answer[-1] < tokenizer.vocab_size and found.consume_token(answer[-1])
        text = tokenizer.decode_batch(np.array(answer, np.int32), np.array([0, len(answer)]))[0]
        assert text.startswith('{"ab": ') and text.endswith("}") and set(text[7:-1]) <= set("ab \u00e9\u65e5")
        assert len(text) == 11


def test_tokenizers_without_an_end_or_without_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="no end-of-text token"):
        refuse_tokenizer(Tokenizer(byte_level("gpt-2")))
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(ValueError, match="the bytes of its tokens are not known"):
        token_bytes(Tokenizer(words, eos_ids=(1,)), 2)
