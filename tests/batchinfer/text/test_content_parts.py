"""Content as a list of text parts: the ids of transformers where a template reads the list, else those of one text."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from chat_models import CHATML, GEMMA, LLAMA_2, LLAMA_3, QWEN, TOOLS, save

from batchinfer.text.tokenizer import Tokenizer

END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HEAD = "<|im_start|>{{ m.role }}\n"
# This template does as Qwen3's: what is no text is left out.
ONLY_IF_TEXT = (
    "{% for m in messages %}{% if m.content is string %}{% set c = m.content %}{% else %}{% set c = '' %}{% endif %}"
    + HEAD
    + "{{ c }}<|im_end|>\n{% endfor %}"
    + END
)
LOOP = (
    "{% for m in messages %}" + HEAD + "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ '\n' if not loop.first }}{{ part['text'] | trim }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}" + END
)
MACRO = (
    "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}{% for item in content %}"
    "{% if 'image' in item %}<start_of_turn>{% elif 'text' in item %}{{ item.text }}|{% endif %}{% endfor %}{% endif %}"
    "{% endmacro %}{% for m in messages %}{% set said = show(m.content) | trim %}" + HEAD + "{{ said }}<|im_end|>\n"
    "{% endfor %}" + END
)
FIRST = "{% for m in messages %}" + HEAD + "{{ m.content[0].text }}<|im_end|>\n{% endfor %}" + END
# This template does as that of Llama 3.2 Vision: the system message is text, others are text or parts.
MIXED = LOOP.replace("{% for m in messages %}", "{{ messages[0].content | trim }}\n{% for m in messages[1:] %}", 1)


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


def chat(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**m, "content": m["content"] if isinstance(m["content"], str) else "".join(p["text"] for p in m["content"])}
        for m in messages
    ]


CHATS = [
    chat(parts("Hello")),
    chat(parts("Hello", " there ", "é 日本語\n")),
    chat(parts("a 'quoted' {text}", "")),
    chat("plain", parts("an", "swer"), parts("and", " now?")),
]


def both(folder: Path) -> tuple[Tokenizer, Any]:
    return Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


def ours_of(ours: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    token_ids, _, errors = ours.encode_chats([messages])
    assert not errors
    return token_ids.tolist()


def theirs_of(theirs: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    ids: list[int] = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)
    return ids


TEXT = {"chatml": CHATML, "qwen": QWEN, "llama 2": LLAMA_2, "llama 3": LLAMA_3, "gemma": GEMMA, "if text": ONLY_IF_TEXT}


@pytest.mark.parametrize("template", TEXT.values(), ids=TEXT)
def test_parts_are_one_text_for_a_template_that_reads_text(tmp_path: Path, template: str) -> None:
    ours, theirs = both(save(tmp_path, template))
    for messages in CHATS:
        assert ours_of(ours, messages) == theirs_of(theirs, joined(messages))


@pytest.mark.parametrize("template", [LOOP, MACRO, TOOLS], ids=["loop", "macro", "json"])
def test_parts_are_as_they_are_for_a_template_that_reads_parts(tmp_path: Path, template: str) -> None:
    ours, theirs = both(save(tmp_path, template))
    for messages in CHATS:
        assert ours_of(ours, messages) == theirs_of(theirs, messages)


def test_a_template_that_reads_the_first_part_alone_finds_all_in_it(tmp_path: Path) -> None:
    ours, theirs = both(save(tmp_path, FIRST))
    assert ours_of(ours, chat(parts("one"))) == theirs_of(theirs, chat(parts("one")))
    assert ours_of(ours, chat(parts("one", " two"))) == theirs_of(theirs, chat(parts("one two")))


def test_each_message_is_given_as_the_template_reads_that_one(tmp_path: Path) -> None:
    ours, theirs = both(save(tmp_path, MIXED))
    messages = [{"role": "system", "content": parts("Be ", "brief.")}, *chat(parts("one", "two"))]
    assert ours_of(ours, messages) == theirs_of(theirs, [{"role": "system", "content": "Be brief."}, *messages[1:]])


def test_no_parts_are_an_empty_text(tmp_path: Path) -> None:
    ours, theirs = both(save(tmp_path, CHATML))
    assert ours_of(ours, chat([])) == theirs_of(theirs, chat(""))


@pytest.mark.parametrize("template", [CHATML, MACRO.replace("}|{%", "}{%")], ids=["text", "parts"])
@pytest.mark.parametrize("texts", [("<|im_end|>",), ("<|im_", "end|>"), ("a<|", "im_e", "nd|>b", "<s>")], ids=str)
def test_parts_give_no_control_token(tmp_path: Path, template: str, texts: tuple[str, ...]) -> None:
    """Also where a template writes parts one behind the other, and they make up a control token's text together."""
    ours, _ = both(save(tmp_path, template))
    control = set(ours.encode_batch(["<|im_start|><|im_end|><s>"], allow_special_tokens=True)[0].tolist())
    harmless, hostile = ours_of(ours, chat(parts(*("x" for _ in texts)))), ours_of(ours, chat(parts(*texts)))
    assert [i for i in hostile if i in control] == [i for i in harmless if i in control]
