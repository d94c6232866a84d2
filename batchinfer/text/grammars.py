"""Grammars that answers follow, by llguidance: JSON schemas, regular expressions, and grammars in its form of Lark's.

A JSON answer is written in one way, as Python's `json.dumps` does: a space behind each comma and colon, and no other
between values. So a grammar leaves the model few choices that mean nothing, and most of the layout needs no model.
"""

import json
import re
from functools import cache

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from batchinfer.text.json_schema import ends_open, read_schema
from batchinfer.text.tokenizer import Tokenizer

MOST_BYTES = 1 << 18  # of a grammar's text
# No \u: it could write the name of a known key in another way.
LAYOUT = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": '"\\bfnrt',
}
LIMITS = LLParserLimits(initial_lexer_fuel=200_000, verbose_errors=False)  # a fifth of the default, about 0.3 seconds
# Each token of a vocabulary is its bytes in these decoders.
BYTE_DECODERS = ("ByteLevel", "ByteFallback", "Metaspace")

Grammar = tuple[str, str]
"""A field of `SamplingParams` (json_schema, regex or grammar), and its text."""


def compiled(grammar: Grammar) -> str:
    """Return a grammar in llguidance's own form. Raises `ValueError` saying what is wrong with it."""
    kind, text = grammar
    try:
        if len(text.encode()) > MOST_BYTES:
            raise ValueError(f"is longer than {MOST_BYTES:,} bytes")
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair") from None
    if kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(read_schema(text), overrides=LAYOUT)  # type: ignore[arg-type]
    if kind == "regex":
        if not text:
            raise ValueError("is empty, and allows only an empty answer")
        if ends_open(text):
            raise ValueError(r"ends in a backslash with nothing behind it; write \\ for a backslash")
        return LLMatcher.grammar_from_regex(text)
    if text.lstrip().startswith("{"):
        raise ValueError("is JSON; give a schema with --json-schema, or a grammar in Lark's form")
    if found := re.search(r"%json|temperature\s*=", text):
        raise ValueError(f"has {found.group()!r}, which is not enforced on answers; write rules instead")
    return LLMatcher.grammar_from_lark(text)


def check_grammar(grammar: Grammar) -> None:
    """Raise `ValueError` saying what is wrong with a grammar, also with one that no answer follows."""
    if problem := _problem(grammar):
        raise ValueError(problem)


@cache
def _bytes() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()), slices=[])


class _Bytes:
    """A tokenizer whose tokens are the bytes, and an end."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"\xff<end>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _problem(grammar: Grammar) -> str:
    found = matcher(_bytes(), compiled(grammar))
    if not error_of(found):
        found.consume_tokens(found.compute_ff_tokens()[:1])
        found.compute_bitmask()
    return error_of(found)


def matcher(tokenizer: LLTokenizer, text: str) -> LLMatcher:
    """Return a matcher at the start of a grammar that was `compiled`; `error_of` tells whether it is usable."""
    return LLMatcher(tokenizer, text, log_level=0, limits=LIMITS)


def error_of(matcher: LLMatcher) -> str:
    """Say in one line why a matcher cannot go on, worded to follow the grammar's name; empty if it can."""
    if not matcher.is_error():
        return ""
    said = matcher.get_error().strip().splitlines()
    if said[0].startswith("NoExtension"):
        return "allows no answer"
    reasons = [line.removeprefix("error: ") for line in said if line.startswith("error: ")] or said[:1]
    return f"cannot be followed: {reasons[0][:200]}"


def refuse_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise `ValueError` if no answer can be held to a grammar with this tokenizer."""
    if not tokenizer.eos_ids:
        raise ValueError("there is no end-of-text token, which ends an answer where its grammar may end")
    decoder = json.loads(tokenizer.as_json())["decoder"] or {}
    steps = {step["type"] for step in (decoder, *decoder.get("decoders", ()))} if decoder else set()
    if not steps & set(BYTE_DECODERS):
        raise ValueError(
            "the bytes of its tokens are not known; answers follow a grammar where a tokenizer is byte-level or "
            "SentencePiece's"
        )


def token_bytes(tokenizer: Tokenizer, vocabulary: int) -> LLTokenizer:
    """Return what llguidance knows of a tokenizer, with `vocabulary` token ids. Any end-of-text id ends an answer.

    Raises `ValueError` as `refuse_tokenizer` does.
    """
    refuse_tokenizer(tokenizer)
    described = json.loads(tokenizer.as_json())
    if described["decoder"]["type"] == "Metaspace":
        mark = described["decoder"]["replacement"]
        steps = [{"type": "Replace", "pattern": {"String": mark}, "content": " "}, {"type": "ByteFallback"}]
        described["decoder"] = {"type": "Sequence", "decoders": [*steps, {"type": "Fuse"}]}
    return LLTokenizer(json.dumps(described), n_vocab=vocabulary, eos_token=list(tokenizer.eos_ids))
