"""Thinking is told from the answer, in every format, whether its tags are tokens or text in the vocabulary."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_models import ARGUED, CORPUS, SPECIAL, TAGS, TEMPLATES, WELL_KNOWN, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchinfer.engine.prompts import END_TOKENS
from batchinfer.text.answer_formats import closes_thinking, reasoning_format_of
from batchinfer.text.answers import AnswerParser
from batchinfer.text.chat import ChatTemplate
from batchinfer.text.reasoning import FORMATS
from batchinfer.text.stop import Stop, printed_answers
from batchinfer.text.tokenizer import Tokenizer

MARKS = sorted({mark for form in FORMATS.values() for mark in form.marks})
# How a vocabulary has the marks: as control tokens, as tokens that are printed, or not at all.
KINDS = ["control", "printed", "spelled"]


@pytest.fixture(scope="module", params=[(kind, sp) for kind in KINDS for sp in (False, True)], ids=str)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    kind, sentence_piece = request.param
    special = [*SPECIAL, *(MARKS if kind == "control" else [])]
    tags = MARKS if kind == "printed" else []
    return Tokenizer.load(save(tmp_path_factory.mktemp("t"), None, sentence_piece, [*CORPUS, "◁▷"], special, tags))


def encoded(tokenizer: Tokenizer, texts: list[str]) -> tuple[Any, Any]:
    return tokenizer.encode_batch(texts, allow_special_tokens=True)


def ends_of(tokenizer: Tokenizer, prompts: list[str]) -> Any:
    ids, offsets = encoded(tokenizer, prompts)
    found = np.full((len(prompts), END_TOKENS), -1, np.int32)
    for i in range(len(prompts)):
        row = ids[offsets[i] : offsets[i + 1]][-END_TOKENS:]
        found[i, END_TOKENS - len(row) :] = row
    return found


def parsed(
    tokenizer: Tokenizer, form: str | None, answer: str, prompt: str = "Hello", stop: tuple[str, ...] = ()
) -> tuple[str | None, str]:
    found = AnswerParser(tokenizer, form, None).parse(
        *encoded(tokenizer, [answer]), ends_of(tokenizer, [prompt]), [Stop(stop)]
    )
    return found.reasoning[0], found.texts[0]


HARMONY = "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>the answer"
CASES = [
    ("think", "Hello", "<think>\nwhy so\n</think>\n\nthe answer ", "why so", "the answer "),
    ("think", "user<think>\n", "why so\n</think>\n\nthe answer", "why so", "the answer"),
    ("think", "user <think>", "<think>why</think>a", "why", "a"),  # opened twice
    ("think", "user<think>\n", "why so the", "why so the", ""),  # cut in its thinking
    ("think", "Hello", "<think>\nwhy so the", "why so the", ""),
    ("think", "Hello", "why</think>a", "why", "a"),  # nobody opened it
    ("think", "<think>\n\n</think>\n\n", "the answer", None, "the answer"),  # the prompt closed it
    ("think", "say <think> to me", "hello", None, "hello"),
    ("think", "Hello", "<think>\n\n</think>\n\nthe answer", None, "the answer"),  # empty
    ("think", "Hello", "<think>a</think>b <think>c</think> d", "a", "b <think>c</think> d"),
    ("think", "Hello", "first <think>a</think> then", "a", "first then"),
    ("think", "Hello", "", None, ""),
    ("think-response", "Hello", "<think>a</think>\n<response>\nb c\n</response>", "a", "b c"),
    ("think-response", "Hello", "<think>a</think><response>b", "a", "b"),
    ("think-answer", "Hello", "<think>\na\n</think>\n<answer>\nb\n</answer>", "a", "b"),
    ("mistral", "Hello", "[THINK]a b[/THINK]c", "a b", "c"),
    ("cohere", "Hello", "<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>b<|END_RESPONSE|>", "a", "b"),
    ("gemma4", "Hello", "<|channel>thought\na thought\n<channel|>b", "a thought", "b"),
    ("gemma4", "model<|channel>thought\n", "a<channel|>b", "a", "b"),
    ("seed", "<seed:think>", "a</seed:think>b", "a", "b"),
    ("kimi", "Hello", "◁think▷a◁/think▷b", "a", "b"),
    ("granite", "Hello", "Here is my thought process: a b. Here's my response:\n\nc", "a b.", "c"),
    ("harmony", "Hello", HARMONY, "why", "the answer"),
    ("harmony", "Hello", "<|channel|>final<|message|>a<|return|>", None, "a"),
    ("harmony", "Hello", "<|channel|>analysis<|message|>why so", "why so", ""),  # cut in its thinking
    ("harmony", "Hello", "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>fi", "why", ""),
    ("harmony", "Hello", "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>analysis"
     "<|message|>why<|end|>", "why", "I look."),
    ("harmony", "Hello", "no channel at all", None, "no channel at all"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "prompt", "answer", "reasoning", "text"), CASES)
def test_an_answer_is_split(
    tokenizer: Tokenizer, form: str, prompt: str, answer: str, reasoning: str | None, text: str
) -> None:
    expected = text
    if "<think>" in text:  # a later tag is a part of the answer, as far as it is printed
        ids, offsets = encoded(tokenizer, [text])
        expected = printed_answers(tokenizer, ids, offsets, [Stop()])[0]
    assert parsed(tokenizer, form, answer, prompt) == (reasoning, expected)


def test_every_format_has_a_case() -> None:
    assert {form for form, *_ in CASES} == FORMATS.keys()


def test_tags_out_of_ordinary_tokens_are_none_where_tags_are_tokens(tokenizer: Tokenizer) -> None:
    plain, offsets = tokenizer.encode_batch(["<think>a</think>b"])
    is_token = "<think>" in tokenizer.added_tokens
    found = AnswerParser(tokenizer, "think", None).parse(plain, offsets, ends_of(tokenizer, ["x"]), [Stop()])
    expected = (None, "<think>a</think>b") if is_token else ("a", "b")
    assert (found.reasoning[0], found.texts[0]) == expected
    # A prompt that spells the tag opens nothing either.
    ends = np.full((1, END_TOKENS), -1, np.int32)
    spelled = tokenizer.encode_batch(["x<think>"])[0][-END_TOKENS:]
    ends[0, END_TOKENS - len(spelled) :] = spelled
    ids, offsets = encoded(tokenizer, ["hello"])
    found = AnswerParser(tokenizer, "think", None).parse(ids, offsets, ends, [Stop()])
    assert (found.reasoning[0], found.texts[0]) == ((None, "hello") if is_token else ("hello", ""))


def test_stop_strings_and_stop_tokens_end_what_they_are_in(tokenizer: Tokenizer) -> None:
    assert parsed(tokenizer, "think", "<think>a b END", stop=("END",)) == ("a b ", "")
    assert parsed(tokenizer, "think", "<think>a</think>b END", stop=("END",)) == ("a", "b ")
    if (close := tokenizer.added_tokens.get("</think>")) is not None:
        ids, offsets = encoded(tokenizer, ["<think>a</think>"])
        hidden = [Stop(token_ids=(close,))]
        found = AnswerParser(tokenizer, "think", None).parse(ids, offsets, ends_of(tokenizer, ["x"]), hidden)
        assert (found.reasoning[0], found.texts[0]) == ("a", "")


quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
words = st.lists(st.sampled_from(["a", " the", "\n", "日本", " user", *MARKS]), max_size=8).map("".join)


@quick
@given(st.sampled_from(sorted(FORMATS)), st.lists(words, max_size=4))
def test_no_word_is_lost_and_answers_without_marks_are_as_they_were(
    tokenizer: Tokenizer, form: str, answers: list[str]
) -> None:
    ids, offsets = encoded(tokenizer, answers)
    ends, stops = ends_of(tokenizer, ["x"] * len(answers)), [Stop()] * len(answers)
    found = AnswerParser(tokenizer, form, None).parse(ids, offsets, ends, stops)
    printed = printed_answers(tokenizer, ids, offsets, stops)
    for answer, text, thought, before in zip(answers, found.texts, found.reasoning, printed, strict=True):
        if not any(mark in answer for mark in FORMATS[form].marks):
            assert (text, thought) == (before, None)
        if form != "harmony":  # there, what stands in a header is no text
            for word in ("日本", " user"):
                assert (text + (thought or "")).count(word.strip()) == before.count(word.strip())


TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
R1 = "{{ messages[0].content }}<think>\n"
SYSTEM_PROMPT = "First think in [THINK]...[/THINK].{{ messages[0].content }}"
GRANITE = "{% if thinking %}Write your thoughts between <think></think> and your response between <response></response>.{% endif %}{{ messages[0].content }}"  # noqa: E501
EXPECTED = {
    **dict.fromkeys(["chatml", "llama 2", "llama_3_1", "gemma", "phi_4", "qwen_2_5"], None),
    "qwen_3": None,  # it knows the tags from earlier turns only, as one for a model that does not think may
    "deepseek_r1": "think", "minimax": "think", "hybrid": "think", "opened": "think", "qwen": "think",
    "harmony": "harmony",
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_a_template_shows_how_its_model_thinks(name: str) -> None:
    source = {**TEMPLATES, **WELL_KNOWN, **ARGUED}[name]
    assert reasoning_format_of(ChatTemplate.compile(source, TOKENS), {}) == EXPECTED[name]


@pytest.mark.parametrize(
    ("source", "form"), [(R1, "think"), (SYSTEM_PROMPT, "mistral"), (GRANITE, "think-response"), ("{% if", None)]
)
def test_a_template_that_tells_tags_to_the_model_shows_them(source: str, form: str | None) -> None:
    if form is not None:
        assert reasoning_format_of(ChatTemplate.compile(source, TOKENS), {}) == form


def test_a_prompt_that_closes_the_thinking_is_known(tmp_path: Path) -> None:
    compiled: Callable[[str], ChatTemplate] = lambda name: ChatTemplate.compile(ARGUED[name], TOKENS)  # noqa: E731
    assert closes_thinking(compiled("hybrid"), {"enable_thinking": False}, "think")
    assert not closes_thinking(compiled("hybrid"), {}, "think")
    assert closes_thinking(compiled("opened"), {"thinking": False}, "think")
    assert not closes_thinking(compiled("opened"), {}, "think")
    assert not closes_thinking(compiled("needy"), {}, "think")


def test_the_tokens_of_this_page_are_not_those_of_another() -> None:
    assert {"<think>", "</think>"} <= set(TAGS)  # as checkpoints have them: printed, and not cut by a template
