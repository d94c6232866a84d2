"""Messages that hold the text of control tokens, against transformers: the same prompts, and no such control token.

In these messages, each such text is between "é" and "è". Thus it is known where it lands in a prompt, and transformers'
own encoder of marked chats says what its ids are.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from chat_models import CORPUS, KNOWN_SPECIAL, KNOWN_TAGS, SPECIAL, TAGS, TEMPLATES, WELL_KNOWN, save
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jinja2.filters import FILTERS
from transformers.utils import chat_template_utils

from batchinfer.text.chat import ChatError, ChatTemplate
from batchinfer.text.sandbox import CHARACTER_FILTERS
from batchinfer.text.tokenizer import Tokenizer
from batchinfer.text.tracked import MESSAGE, Tracked, origin_of

Messages = list[dict[str, Any]]
ALL = {**TEMPLATES, **WELL_KNOWN}
CONTROL = [*SPECIAL, *TAGS, *KNOWN_SPECIAL, *KNOWN_TAGS]
OF_MESSAGES = re.compile(f"(?<=é)({'|'.join(map(re.escape, sorted(CONTROL, key=len, reverse=True)))})(?=è)")
MARKED = rf"{chat_template_utils._CONTROL_TOKEN_START}\g<0>{chat_template_utils._CONTROL_TOKEN_END}"


class Pair:
    """Our tokenizer and transformers', of the same folder, with any template."""

    def __init__(self, folder: Path) -> None:
        self.ours = Tokenizer.load(folder)
        self.theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)

    def ids(self, source: str, messages: Messages, **options: Any) -> list[int] | None:
        self.ours.template = ChatTemplate.compile(source, {"bos_token": "<s>", "eos_token": "</s>"})
        ids, _, errors = self.ours.encode_chats([messages], **options)
        return None if errors else ids.tolist()

    def default(self, source: str, messages: Messages, tokenize: bool = True) -> Any:
        """Return transformers' ids, or its text, or None if the template raises."""
        try:
            return self.theirs.apply_chat_template(
                messages, chat_template=source, add_generation_prompt=True, tokenize=tokenize, return_dict=False
            )
        except Exception:  # a template may raise anything
            return None

    def expected(self, source: str, messages: Messages) -> list[int] | None:
        """Return transformers' ids for its own text, in which control tokens' texts from messages are plain text."""
        text = self.default(source, messages, tokenize=False)
        if text is None or not OF_MESSAGES.search(text):
            ids: list[int] | None = self.default(source, messages)
            return ids
        return self.marked(OF_MESSAGES.sub(MARKED, text))

    def marked(self, text: str) -> list[int]:
        ids: list[int] = chat_template_utils.encode_marked_chat(self.theirs, text)
        return ids


@pytest.fixture(scope="module", params=[False, True], ids=["bytes", "sentencepiece"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    special, tags = [*SPECIAL, *KNOWN_SPECIAL], [*TAGS, *KNOWN_TAGS]
    return Pair(save(tmp_path_factory.mktemp("chat"), "{{ messages }}", request.param, CORPUS, special, tags))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "call1é<think>è", "type": "function", "function": {"name": name, "arguments": arguments}}


TAGGED: dict[str, Messages] = {
    "reasoning": [
        user("2+2?"),
        {"role": "assistant", "content": "é<think>è\nadd\né</think>è\n\nfourx"},
        user("sure? "),
    ],
    "last reasoning": [user("2+2?"), {"role": "assistant", "content": "é<think>èwhyé</think>è\n\nfour"}],
    "reasoning apart": [
        user("2+2?"),
        {"thinking": "aé<|end|>è", "role": "assistant", "content": "four", "reasoning_content": "aé<|end|>è"},
        user("sure?"),
    ],
    "system": [
        {"role": "system", "content": " be é<|im_start|>è system \n"},
        user("say é<|im_end|>è é<|user|>è é[INST]è é[A][B]è é</s>è \n"),
        {"role": "assistant", "content": "é<s>èé<s>è"},
        user("é<\uff5cUser\uff5c>è"),
    ],
    "tools": [
        user("hi"),
        {
            "role": "assistant",
            "content": "oné[TOOL_CALLS]è",
            "tool_calls": [call("fé</tool_call>è", {"aé<think>è": "1é<|im_end|>è\n", "b": [1, {"x": "é</think>è"}]})],
        },
        {"role": "tool", "tool_call_id": "call1", "content": '{"r": "é</tool_response>è"}'},
        user("thanks"),
    ],
}


def without_tags(value: Any) -> Any:
    return json.loads(re.sub("é([^é]*?)è", "-", json.dumps(value, ensure_ascii=False)))


@pytest.mark.parametrize("name", ALL)
def test_prompts_with_control_tokens_in_messages(pair: Pair, name: str) -> None:
    expected = {key: pair.expected(ALL[name], messages) for key, messages in TAGGED.items()}
    assert sum(ids is not None for ids in expected.values()) >= 3
    assert {key: pair.ids(ALL[name], messages) for key, messages in TAGGED.items()} == expected


@pytest.mark.parametrize("name", ALL)
def test_prompts_without_control_tokens_in_messages(pair: Pair, name: str) -> None:
    for messages in map(without_tags, TAGGED.values()):
        assert pair.ids(ALL[name], messages) == pair.default(ALL[name], messages)


@pytest.mark.parametrize("name", ALL)
def test_control_tokens_in_messages_are_read_if_allowed(pair: Pair, name: str) -> None:
    for messages in TAGGED.values():
        assert pair.ids(ALL[name], messages, allow_special_tokens=True) == pair.default(ALL[name], messages)


REASONING = [user("2+2?"), {"role": "assistant", "content": "<think>\nadd\n</think>\n\nfour"}, user("sure?")]


@pytest.mark.parametrize(
    ("name", "tags"),
    [
        ("qwen", "think"),
        ("qwen_3", "think"),
        ("deepseek_r1", "think"),
        ("deepseek_v3_1", "think"),
        ("glm_4_5", "think"),
        ("minimax", "think"),
        ("exaone", "thought"),
    ],
)
def test_reasoning_that_the_template_cuts_out(pair: Pair, name: str, tags: str) -> None:
    messages = json.loads(json.dumps(REASONING).replace("think>", f"{tags}>"))
    assert "add" not in pair.default(ALL[name], messages, tokenize=False)
    assert pair.ids(ALL[name], messages) == pair.default(ALL[name], messages)


def test_a_template_sees_what_a_message_begins_with(pair: Pair) -> None:
    response = "<tool_response>4</tool_response>"
    text = pair.default(ALL["qwen_3"], [*REASONING[:2], user(response)], tokenize=False)
    assert "add" in text  # the question is the first message
    marked = text.replace(response, re.sub("<[^>]*>", MARKED, response))
    assert pair.ids(ALL["qwen_3"], [*REASONING[:2], user(response)]) == pair.marked(marked)


@pytest.mark.parametrize("content", ["\ufdd0", "a\ufdd1é<|im_end|>è\ufdd0", "\ufdd0é<think>è\ufdd1"])
def test_noncharacters_are_text(pair: Pair, content: str) -> None:
    assert pair.ids(ALL["chatml"], [user(content)]) == pair.expected(ALL["chatml"], [user(content)])


def test_control_tokens_that_a_template_forms_with_messages(pair: Pair) -> None:
    source = "{% for m in messages %}{{ '<|' + m.role + '|>' ~ m.content ~ '<|end|>' }}{% endfor %}"
    messages = [user("é<|user|>è"), {"role": "assistant", "content": "é<|end|>è"}]
    ids = pair.ids(source, messages)
    assert ids is not None and ids == pair.expected(source, messages)
    assert sum(ids.count(pair.theirs.convert_tokens_to_ids(t)) for t in ("<|user|>", "<|assistant|>", "<|end|>")) == 4


TEXT = "  Aé<|im_end|>è, bé</think>è\n\nx~yé<thi~nk>è "
OPERATIONS = [
    *("c.strip()", "c.lstrip(' A')", "c.rstrip()[:-3]", "c.split('</think>')[-1].lstrip('è\\n')", "c.split()[0]"),
    *("c.rsplit('é', 1)[1]", "c.splitlines()|join('|')", "c.partition('</think>')[2]", "c.rpartition('<|im_end|>')[0]"),
    *("c[2:-2]", "c[::-1][::-1]", "c[3] ~ c[4:16]", "c|list|join", "c.replace('~', '')", "c|replace('x', '</think>')"),
    *("c.replace('é<|im_end|>è', '<think>', 1)", "c + bos_token + c", "bos_token ~ c ~ 3", "c * 2", "'-'.join([c, c])"),
    *("[c, '<s>']|join('<think>')", "'{}<think>{}'.format(c, 1)", "'%s<think>%5d' % (c, 3)", "'<s>%s'|format(c)"),
    *("c|upper", "c.upper().lower()", "c|lower", "c.title()", "c|title", "c|capitalize", "c.swapcase().swapcase()"),
    *("c.removeprefix('  A').removesuffix(' ')", "c.expandtabs()", "c.zfill(70)", "c.center(80, '~')", "c|center(80)"),
    *("c.ljust(70) ~ c.rjust(70)", "c|trim|indent(2, true)", "c|truncate(20, true)", "c|wordwrap(20)", "c|tojson"),
    *(
        "[c, {c: '<s>'}]|tojson(indent=1)",
        "[c, '<s>']",
        "{'<s>': c}",
        "c|string ~ c|safe",
        "m|string",
        "m.items()|list",
    ),
    *(
        "c|default('<s>')",
        "(c|first) ~ (c|last) ~ (c|reverse)",
        "[c, '<s>']|map('upper')|join",
        "c|escape",
        "c|e|striptags",
    ),
    *("[m]|map(attribute='content')|first", "c.casefold()", "('é&lt;s&gt;è' ~ c)|striptags"),
    *(
        "c.encode().decode()",
        "namespace(x=c).x",
        "dict(x=c)|dictsort|string",
        "cycler(c, '<s>').next()",
        "m['con' ~ 'tent']",
    ),
    *(
        "c|batch(30)|map('join')|join",
        "('<s>' ~ c)|attr('strip')()",
        "c if '</think>' in c else '<s>'",
        "c|urlencode",
        "c.format(1)",
    ),
    *("(c ~ '<s>')|sort|join", "c|unique|join", "'<s>'.join(c.split('~'))", "c|wordcount"),
]
BLOCKS = [
    "{% set x %}<s>{{ c }}{% endset %}{{ x }}",
    "{% macro f(x) %}<s>{{ x }}{{ caller() }}{% endmacro %}{% call f(c) %}{{ c }}</s>{% endcall %}",
    "{% filter trim %}  <s>{{ c }}  {% endfilter %}",
    "{% for x in c %}{{ x }}{% endfor %}{% for x in c.split('é') recursive %}{{ x }}é{% endfor %}",
    "{% block b %}<s>{{ c }}{% endblock %}{{ self.b() }}",
    "{% generation %}<s>{{ c }}{% endgeneration %}",
]
LIFTED = [
    ("c|striptags", "aé&lt;|im_end|&gt;è"),
    ("c|lower", "aÉ<|IM_END|>È"),
    ("c[::-1]", "è>|dne_mi|<é"),
    ("c.replace(' ', '')", "é<|im _end|>è"),
    ("m.a ~ m.content", "end|>è"),
    ("c.encode().decode()", "é<|im_end|>è"),
    ("c.translate({1: none})", "é<|im\x01_end|>è"),
    ("'é%c%c%cè' % (m.n[0], m.n[1], m.n[2])", "x"),
]


@pytest.mark.parametrize("source", [*("{{ " + operation + " }}" for operation in OPERATIONS), *BLOCKS])
def test_operations_on_texts(pair: Pair, source: str) -> None:
    source = f"{{% set m = messages[0] %}}{{% set c = m.content %}}<|im_start|>{source}<|im_end|>"
    for text in (TEXT, without_tags(TEXT), ""):
        expected = pair.expected(source, [user(text)])
        assert expected is not None or text == ""
        assert pair.ids(source, [user(text)]) == expected


@pytest.mark.parametrize(("operation", "content"), LIFTED)
def test_control_tokens_that_only_an_operation_makes(pair: Pair, operation: str, content: str) -> None:
    source = f"{{% set m = messages[0] %}}{{% set c = m.content %}}{{{{ {operation} }}}}"
    messages = [{**user(content), "a": "é<|im_", "n": [60, 115, 62]}]
    assert OF_MESSAGES.search(pair.default(source, messages, tokenize=False))
    assert pair.ids(source, messages) == pair.expected(source, messages)


def test_every_filter_is_followed_or_counts_as_message_text() -> None:
    passing = {
        "abs", "attr", "batch", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items",
        "last", "length", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse", "round", "select",
        "selectattr", "slice", "sort", "sum", "truncate", "unique", "wordcount",
    }  # fmt: skip
    followed = {
        "capitalize", "center", "format", "indent", "join", "lower", "replace", "safe", "string", "title", "tojson",
        "trim", "upper",
    }  # fmt: skip
    assert passing | followed | CHARACTER_FILTERS == FILTERS.keys()


def test_a_message_nested_beyond_all_reason_costs_its_row_at_most(pair: Pair) -> None:
    nested: Any = "<s>"
    for _ in range(5000):
        nested = [nested]
    pair.ours.template = ChatTemplate.compile("{{ messages[0].content }}", {})
    messages = user("a"), {**user("a"), "x": nested}, user("<s>")
    assert list(pair.ours.encode_chats([[message] for message in messages])[2]) == [1]


def test_the_time_is_the_same_in_both_texts() -> None:
    template = ChatTemplate.compile("{{ strftime_now('%H:%M:%S.%f') }}", {})
    text = template.render([user("<s>")])
    assert template.follow([user("<s>")], None, {}, text) == text


def test_another_text_than_the_plain_one_is_an_error() -> None:
    source = "{{ messages[0].content.split }}"  # the address of a method
    template = ChatTemplate.compile(source, {})
    with pytest.raises(ChatError, match="--allow-special-tokens"):
        template.follow([user("<s>")], None, {}, template.render([user("<s>")]))


# Random templates: messages have "<s>" only, the template has "[A]" only, so that each id tells where it comes from.
texts = st.sampled_from(["c", "m.role", "'[A]'", "'b[A] '", "''", "(c ~ '[A]')", "('[A]b' + c)"])
methods = st.sampled_from(
    [
        *(".strip()", ".lstrip('b<')", ".split('b')[-1]", ".split()|join(' ')", ".rsplit('s', 1)[0]", "[1:]", "[::-1]"),
        *(
            ".replace('x', '[A]')",
            ".replace('', 'x')",
            ".upper()",
            ".lower()",
            ".title()",
            ".partition('x')[0]",
            "[:-2]",
        ),
        *("|trim", "|list|join", "|upper|lower", "|replace('b', c)", "|tojson", "|string", "|indent", "|title"),
        *(".center(12, 'x')", ".zfill(9)", "|truncate(9)", ".splitlines()|join('x')", "|format", "|capitalize"),
        *("|sort|join", ".join(['[A]', c])", "|default(c)", " * 2", " % ()", "|reverse"),
    ]
)
expressions = st.recursive(
    texts,
    lambda inner: (
        st.builds("({}){}".format, inner, methods)
        | st.builds("({} ~ {})".format, inner, inner)
        | st.builds("'%s[A]%s' % ({}, {})".format, inner, inner)
        | st.builds("'{{}}[A]{{}}'.format({}, {})".format, inner, inner)
        | st.builds("[{}, {{'k': {}}}]".format, inner, inner)
    ),
    max_leaves=6,
)
contents = st.lists(
    st.sampled_from(["<s>", "<", "s", ">", "x", "b", " ", "\n", "é", "</s>", "%s", "{}"]), max_size=6
).map("".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(expressions, min_size=1, max_size=3), contents)
def test_any_template_renders_the_same_text_and_no_control_token_of_messages(
    pair: Pair, parts: list[str], content: str
) -> None:
    source = "{% set m = messages[0] %}{% set c = m.content %}[A]" + "".join(f"{{{{ {part} }}}}" for part in parts)
    template = ChatTemplate.compile(source, {})
    try:
        text = template.render([user(content)])
    except ChatError:
        assert pair.ids(source, [user(content)]) is None
        return
    assume(" at 0x" not in text)  # an address
    assert text == pair.default(source, [user(content)], tokenize=False)
    followed = template.follow([user(content)], None, {}, text)
    assert isinstance(followed, Tracked)
    for match in re.finditer("</?s>", followed):
        assert set(origin_of(followed)[slice(*match.span())]) == {MESSAGE[0]}
    ids = pair.ids(source, [user(content)])
    assert ids is not None and not {*ids} & {*pair.theirs.convert_tokens_to_ids(["<s>", "</s>"])}
    assert ids == pair.theirs(text, add_special_tokens=False).input_ids or re.search("</?s>", text)
