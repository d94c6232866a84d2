"""Tool calls are found in answers as the models' own chat templates write them, and nothing else is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_models import ARGUED, KNOWN_SPECIAL, SPECIAL, TEMPLATES, WELL_KNOWN, save
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from batchinfer.engine.prompts import END_TOKENS
from batchinfer.text.answer_formats import tool_format_of
from batchinfer.text.answers import AnswerParser
from batchinfer.text.chat import ChatTemplate
from batchinfer.text.stop import Stop
from batchinfer.text.tokenizer import Tokenizer
from batchinfer.text.tool_calls import FORMATS

CONTROL = ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "[THINK]", "[/THINK]"]
PRINTED = ["<tool_call>", "</tool_call>", "<think>", "</think>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    special = [*SPECIAL, *CONTROL, *(mark for mark in FORMATS["harmony"].marks)]
    return Tokenizer.load(save(tmp_path_factory.mktemp("t"), None, special=special, tags=PRINTED))


def parsed(
    tokenizer: Tokenizer, tools: str, answer: str, thinking: str | None = None
) -> tuple[list[tuple[str, Any]] | None, str, int, str | None]:
    """(calls as values, text, whether some text looks like a call and is none, thinking)."""
    ids, offsets = tokenizer.encode_batch([answer], allow_special_tokens=True)
    ends = np.full((1, END_TOKENS), -1, np.int32)
    found = AnswerParser(tokenizer, thinking, tools).parse(ids, offsets, ends, [Stop()])
    calls = found.tool_calls[0] and [(call.name, json.loads(call.arguments)) for call in found.tool_calls[0]]
    return calls, found.texts[0], len(found.unparsed), found.reasoning[0]


CALLS = [("f", {"a": 1, "b": [None, "é"]}), ("g.h", {})]
JSON = [json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) for name, arguments in CALLS]
LLAMA = [text.replace('"arguments"', '"parameters"') for text in JSON]
WHOLE = [
    ("hermes", f"<tool_call>\n{JSON[0]}\n</tool_call>\n<tool_call>{JSON[1]}</tool_call>", CALLS, ""),
    ("hermes", f"I look.\n<tool_call>{JSON[0]}", CALLS[:1], "I look."),  # no closing tag
    ("hermes", '<tool_call>{"name": "g.h"}</tool_call>', CALLS[1:], ""),
    ("hermes", f'<tool_call>{json.dumps({"name": "f", "arguments": json.dumps(CALLS[0][1])})}', CALLS[:1], ""),
    ("llama3", LLAMA[0], CALLS[:1], ""),
    ("llama3", f"{LLAMA[0]}; {LLAMA[1]}", CALLS, ""),
    ("llama3", f"[{LLAMA[0]}, {LLAMA[1]}]", CALLS, ""),
    ("llama3", f"<|python_tag|>{LLAMA[0]}", CALLS[:1], ""),
    ("llama3", '{"type": "function", "name": "g.h", "parameters": {}}', CALLS[1:], ""),
    ("mistral", f"[TOOL_CALLS][{JSON[0]}, {JSON[1]}]", CALLS, ""),
    ("mistral", f'I look.[TOOL_CALLS]f[ARGS]{json.dumps(CALLS[0][1])}[TOOL_CALLS]g.h[ARGS]{{}}', CALLS, "I look."),
    ("mistral", "[TOOL_CALLS]g.h[CALL_ID]abc123def[ARGS]{}", CALLS[1:], ""),
    ("mistral", "[TOOL_CALLS]g.h{}", CALLS[1:], ""),
    ("harmony", '<|channel|>commentary to=functions.g.h <|constrain|>json<|message|>{}<|call|>', CALLS[1:], ""),
]  # fmt: skip
BROKEN = [
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}', True),
    ("hermes", "<tool_call>\nf(1)\n</tool_call> done", True),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>', True),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', True),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>', True),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>', True),
    ("hermes", f'<tool_call>{"[" * 2000}</tool_call>', True),
    ("hermes", "<tool_call></tool_call>", True),
    ("hermes", f"no tags: {JSON[0]}", False),
    ("llama3", '{"name": "Bob", "age": 3}', False),
    ("llama3", '{"name": "f", "parameters": {"a": ', True),
    ("llama3", f'{LLAMA[0]}; and {LLAMA[1]}', True),
    ("llama3", '[1, 2]', False),
    ("mistral", "plain [1]", False),
]  # fmt: skip


@pytest.mark.parametrize(("form", "answer", "calls", "text"), WHOLE)
def test_calls_are_taken_out_of_the_text(
    tokenizer: Tokenizer, form: str, answer: str, calls: list[Any], text: str
) -> None:
    assert parsed(tokenizer, form, answer) == (calls, text, 0, None)


@pytest.mark.parametrize(("form", "answer", "failed"), BROKEN)
def test_what_does_not_parse_stays_in_the_text(tokenizer: Tokenizer, form: str, answer: str, failed: bool) -> None:
    assert parsed(tokenizer, form, answer) == (None, answer, int(failed), None)


def test_only_control_tokens_are_left_out_of_what_does_not_parse(tokenizer: Tokenizer) -> None:
    assert parsed(tokenizer, "mistral", "[TOOL_CALLS]f[ARGS]{")[:3] == (None, "f{", 1)
    assert parsed(tokenizer, "llama3", '<|python_tag|>search.call(query="x")')[:3] == (
        None,
        'search.call(query="x")',
        1,
    )
    found = parsed(tokenizer, "harmony", "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{<|call|>")
    assert found[:3] == (None, "commentary to=functions.f json{", 1)
    # A good call beside a broken one is taken out.
    found = parsed(tokenizer, "hermes", f"<tool_call>{JSON[1]}</tool_call><tool_call>oops</tool_call>")
    assert found[:3] == (CALLS[1:], "<tool_call>oops</tool_call>", 1)


def test_thinking_and_calls_are_both_taken_out(tokenizer: Tokenizer) -> None:
    call = f"<tool_call>{JSON[1]}</tool_call>"
    assert parsed(tokenizer, "hermes", f"<think>{call}</think>\n\nI look.\n{call}", "think") == (
        CALLS[1:], "I look.", 0, call
    )  # fmt: skip
    assert parsed(tokenizer, "hermes", f"<think>cut {call}", "think") == (None, "", 0, f"cut {call}")
    assert parsed(tokenizer, "mistral", "[THINK]why[/THINK][TOOL_CALLS]g.h[ARGS]{}", "mistral") == (
        CALLS[1:], "", 0, "why"
    )  # fmt: skip
    harmony = (
        "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant to=functions.g.h<|channel|>commentary json<|message|>{}<|call|>"
    )
    assert parsed(tokenizer, "harmony", harmony, "harmony") == (CALLS[1:], "I look.", 0, "why")
    first = " to=functions.g.h<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
    assert parsed(tokenizer, "harmony", first, "harmony") == (CALLS[1:], "", 0, None)


USER = {"role": "user", "content": "Hello"}
OWN = {"qwen_2_5": "hermes", "qwen_3": "hermes", "llama_3_1": "llama3", "mistral": "mistral", "harmony": "harmony"}


@pytest.mark.parametrize("name", OWN)
@given(arguments=st.dictionaries(st.text('ab é"\\{}', max_size=3), st.integers() | st.text("x <>&'\n", max_size=4)))
@settings(max_examples=20, deadline=None)
def test_what_a_models_own_template_writes_is_found(tokenizer: Tokenizer, name: str, arguments: dict[str, Any]) -> None:
    """transformers renders a turn with a call; what that adds to the prompt is what the model itself would write."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "look_up", "arguments": arguments}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    options = {"chat_template": WELL_KNOWN[name], "bos_token": "<s>", "eos_token": "</s>"}
    (with_turn,), _ = render_jinja_template([[USER, turn]], **options)
    (before,), _ = render_jinja_template([[USER]], add_generation_prompt=True, **options)
    written = with_turn.removeprefix(before)
    assert written != with_turn
    assert tool_format_of(ChatTemplate.compile(WELL_KNOWN[name], {})) == OWN[name]
    calls, _, failed, _ = parsed(tokenizer, OWN[name], written.partition("<|im_end|>")[0])
    assert (calls, failed) == ([("look_up", arguments)], 0)


def test_templates_without_a_known_format_show_none() -> None:
    for name, source in {**TEMPLATES, **WELL_KNOWN, **ARGUED}.items():
        form = tool_format_of(ChatTemplate.compile(source, {}))
        assert form == OWN.get(name), name
    assert "qwen_3_coder" in WELL_KNOWN and "<tool_call>" in WELL_KNOWN["qwen_3_coder"]
    assert {"<|channel|>", "[TOOL_CALLS]"} <= set(KNOWN_SPECIAL)


def test_no_answer_breaks_a_parser(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    marks = sorted({mark for form in FORMATS.values() for mark in form.marks})
    words = [*marks, "{", "}", '"name"', ":", '"f"', '"arguments"', ",", "[", "]", " to=functions.f", "x", " "]
    answers = ["".join(rng.choice(words, rng.integers(0, 14))) for _ in range(400)]
    ids, offsets = tokenizer.encode_batch(answers, allow_special_tokens=True)
    ends = np.full((len(answers), END_TOKENS), -1, np.int32)
    for tools in FORMATS:
        for thinking in (None, "think", "harmony", "mistral"):
            found = AnswerParser(tokenizer, thinking, tools).parse(ids, offsets, ends, [Stop()] * len(answers))
            assert len(found.texts) == len(found.tool_calls) == len(answers)
            if thinking is None:  # every x is somewhere
                for answer, text, calls in zip(answers, found.texts, found.tool_calls, strict=True):
                    assert answer.count("x") == (text + str(calls)).count("x")
