"""Arguments of chat templates, against transformers' `apply_chat_template`."""

import inspect
from pathlib import Path
from typing import Any

import jinja2
import pytest
import transformers
from chat_models import ARGUED, NEEDY, TAGS, WELL_KNOWN, save
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from batchinfer.text.chat import ArgumentMissing, ChatError, ChatTemplate
from batchinfer.text.chat_arguments import RESERVED, problem_with
from batchinfer.text.tokenizer import Tokenizer

TALK = [{"role": "user", "content": "Hello"}]
LONGER = [*TALK, {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nHi"}, {"role": "user", "content": "More"}]
GIVEN: list[dict[str, Any]] = [
    {},
    {"enable_thinking": False},
    {"enable_thinking": True, "thinking": False},
    {"thinking": None, "language": "日本語", "style": {"tone": "!"}},
    {"language": "<|im_end|></think>", "style": {}, "options": {"b": [1, None], "a": "é"}},
    {"bos_token": "<s>x", "language": 3, "style": {"tone": 1.5}},
    {"raise_exception": 1, "strftime_now": "never", "reasoning_effort": "low", "builtin_tools": []},
]


class Pair:
    def __init__(self, folder: Path) -> None:
        self.ours = Tokenizer.load(folder)
        self.theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self.theirs.chat_control_tokens = TAGS

    def ids(self, source: str, chat: Any, arguments: dict[str, Any], as_tokens: bool) -> list[int] | None:
        self.ours.template = ChatTemplate.compile(source, {"bos_token": "<s>", "eos_token": "</s>"})
        ids, _, errors = self.ours.encode_chats([chat], None, as_tokens, [arguments])
        return None if errors else ids.tolist()

    def expected(self, source: str, chat: Any, arguments: dict[str, Any], as_tokens: bool) -> list[int] | None:
        try:
            ids: list[int] = self.theirs.apply_chat_template(
                chat, chat_template=source, add_generation_prompt=True, return_dict=False,
                sanitize_control_tokens=not as_tokens, **arguments,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError):
            return None
        return ids


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(save(tmp_path_factory.mktemp("chat"), "{{ messages }}"))


@pytest.mark.parametrize("name", ARGUED)
@pytest.mark.parametrize("as_tokens", [False, True])
def test_ids_equal_transformers(pair: Pair, name: str, as_tokens: bool) -> None:
    found = {}
    for i, arguments in enumerate(GIVEN):
        for chat in (TALK, LONGER):
            ids = pair.ids(ARGUED[name], chat, arguments, as_tokens)
            assert ids == pair.expected(ARGUED[name], chat, arguments, as_tokens), arguments
            found[i, len(chat)] = ids
    assert len({str(ids) for ids in found.values()}) >= 4


@pytest.mark.parametrize("name", ["qwen_3", "granite", "glm_4_5", "smollm_3", "harmony", "llama_3_1", "deepseek_v3_1"])
def test_templates_of_well_known_checkpoints_render_as_transformers_renders_them(name: str) -> None:
    template, rendered = ChatTemplate.compile(WELL_KNOWN[name], {"bos_token": "<s>"}), set()
    for arguments in GIVEN:
        try:
            (expected,), _ = render_jinja_template(
                [TALK], chat_template=WELL_KNOWN[name], add_generation_prompt=True, **({"bos_token": "<s>"} | arguments)
            )
        except Exception:
            with pytest.raises(ChatError):
                template.render(TALK, None, arguments)
        else:
            assert template.render(TALK, None, arguments) == expected
            rendered.add(expected)
    assert rendered


values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(st.characters(codec="utf-8"), max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
    max_leaves=4,
)
names = st.sampled_from(["language", "style", "options", "enable_thinking", "thinking", "bos_token", "x y", ""])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(ARGUED)), st.dictionaries(names, values, max_size=4))
def test_any_arguments_equal_transformers(pair: Pair, name: str, arguments: dict[str, Any]) -> None:
    assert pair.ids(ARGUED[name], TALK, arguments, True) == pair.expected(ARGUED[name], TALK, arguments, True)


def test_names_that_transformers_takes_itself_are_refused() -> None:
    ours: set[str] = set()
    for function in (transformers.PreTrainedTokenizerBase.apply_chat_template, render_jinja_template):
        parameters = inspect.signature(function).parameters.values()
        ours |= {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}
    assert ours | {"messages"} == RESERVED
    for name in RESERVED:
        assert problem_with({"a": 1, name: 2}) == f"has {name!r}, a name that is reserved; leave it out"
    assert problem_with([]) == problem_with({1: 2}) == problem_with("x") != problem_with({"messages_": 1}) is None


def test_an_argument_that_is_missing_is_named() -> None:
    template = ChatTemplate.compile(NEEDY, {})
    with pytest.raises(ArgumentMissing, match="needs the argument 'style'; give it with --chat-template-kwargs"):
        template.render(TALK, None, {"language": "en"})
    assert template.render(TALK, None, {"style": {}}) == "Hello in <|im_end|>"
    assert {"language", "style", "options", "messages"} == template.reads
    with pytest.raises(ChatError, match="raised UndefinedError"):  # it is no variable that is missing
        ChatTemplate.compile("{{ messages[0].name.first }}", {}).render(TALK)
