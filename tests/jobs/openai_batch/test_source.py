"""From lines to the engine's requests: the tokens that transformers makes, each line's own sampling, or its error."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from batch_files import CHAT, chat, completion, request, write_batch
from chat_models import HYBRID, save

from batchinfer.engine.request import Requests, RowError
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.jobs.openai_batch.source import RequestSource
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.table import Table
from batchinfer.text.tokenizer import Tokenizer

CONTEXT = 200
TEMPLATE = "{% if tools %}{{ tools | tojson }}{% endif %}" + HYBRID
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("model"), TEMPLATE)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.load(model)


class Source:
    """Makes requests of lines."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def __call__(
        self, *lines: Any, repeated: dict[int, int] | None = None, **fields: Any
    ) -> tuple[Requests, dict[int, RowError]]:
        path = write_batch(self.folder / "in.jsonl", *lines)
        given = {"sampling": SamplingParams(max_tokens=20), "any_model": True} | fields
        spec = JobSpec(inputs=(path,), output=self.folder / "o.jsonl", model="org/m", openai_batch=True, **given)
        source = RequestSource(spec, self.tokenizer, CONTEXT, repeated or {})
        ((first, batch),) = Table.open([path], lines=True).batches(source.columns, 1000)
        assert first == 0
        return source.tokenize(first, batch)

    def prompts(self, *lines: Any, **fields: Any) -> list[list[int]]:
        requests, errors = self(*lines, **fields)
        assert errors == {}
        return [ids.tolist() for ids in np.split(requests.token_ids, requests.offsets[1:-1])]

    def params(self, *lines: Any, **fields: Any) -> list[SamplingParams]:
        requests, errors = self(*lines, **fields)
        assert errors == {}
        return [requests.params[i] for i in requests.param_index]

    def error(self, line: Any, **fields: Any) -> RowError:
        requests, errors = self(line, **fields)
        assert len(requests) == 0 and errors.keys() == {0}
        return errors[0]


@pytest.fixture
def source(tmp_path: Path, tokenizer: Tokenizer) -> Source:
    return Source(tmp_path, tokenizer)


def test_prompts_have_the_tokens_that_transformers_gives_them(source: Source, model: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(model)

    def rendered(messages: list[dict[str, Any]], **more: Any) -> list[int]:
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False, **more)
        return [int(token) for token in ids]

    user = [{"role": "user", "content": "Hello"}]
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    talk = [{"role": "system", "content": "é"}, *user, {"role": "assistant", "content": "x"}, *user]
    found = source.prompts(
        chat("a"),
        completion("b", "Hello 日本語"),
        chat("c", parts),
        completion("d", [5, 6, 7]),
        request("e", CHAT, messages=talk, chat_template_kwargs={"enable_thinking": False}),
        chat("f", tools=[TOOL]),
        chat("g", tools=[TOOL], tool_choice="none"),
        completion("h", [[8, 9]]),
        completion("i", ["Hello"]),
    )
    assert found[0] == rendered(user) == found[2] == found[6]
    assert found[1] == theirs("Hello 日本語").input_ids and found[8] == theirs("Hello").input_ids
    assert (found[3], found[7]) == ([5, 6, 7], [8, 9])
    assert found[4] == rendered(talk, enable_thinking=False)
    assert found[5] == rendered(user, tools=[TOOL]) != found[0]


def test_flags_give_what_lines_leave_out(source: Source) -> None:
    system = [{"role": "system", "content": "Be brief."}]
    user = [{"role": "user", "content": "Hello"}]
    plain = source.prompts(request("a", messages=[*system, *user], chat_template_kwargs={"enable_thinking": False}))
    found = source.prompts(
        chat("a"),
        request("b", messages=[*system, *user]),
        system_prompt="Be brief.",
        chat_template_kwargs={"enable_thinking": False},
    )
    assert found == plain * 2
    (other,) = source.prompts(
        chat("a", chat_template_kwargs={"enable_thinking": True}), chat_template_kwargs={"enable_thinking": False}
    )
    assert other != source.prompts(chat("a"), chat_template_kwargs={"enable_thinking": False})[0]


def test_each_line_has_params_of_its_own(source: Source) -> None:
    found = source.params(
        chat("a"),
        chat("b", tools=[TOOL], temperature=1, max_tokens=3),
        completion("c", stop="x"),
        completion("d", [1] * (CONTEXT - 5), n=2),
        chat("e", response_format={"type": "json_object"}),
    )
    assert found == [
        SamplingParams(max_tokens=20, parsed=("reasoning",)),
        SamplingParams(max_tokens=3, temperature=1, parsed=("reasoning", "tool_calls")),
        SamplingParams(max_tokens=20, stop=("x",), parsed=()),
        SamplingParams(max_tokens=5, parsed=()),
        SamplingParams(max_tokens=20, json_schema='{"type": "object"}', parsed=()),
    ]


def test_seeds_come_from_the_custom_id_or_from_the_seed_and_the_prompt(source: Source) -> None:
    lines = [chat("a"), chat("b"), chat("c", seed=7), chat("d", seed=7), chat("e", seed=8), chat("f", "x", seed=7)]
    seeds = source(*lines)[0].seeds.tolist()
    assert seeds[2] == seeds[3] and len(set(seeds)) == 5
    again = source(*reversed(lines))[0].seeds.tolist()
    assert again == seeds[::-1]
    others = source(*lines, seed=1)[0].seeds.tolist()
    assert [a == b for a, b in zip(seeds, others, strict=True)] == [False, False, True, True, True, True]


@pytest.mark.parametrize(
    ("line", "code", "named"),
    [
        (request("a", messages=[]), "bad_messages", "one message or more"),
        (request("a"), "null_prompt", "messages"),
        (chat("a", [{"type": "image_url", "image_url": {"url": "x"}}]), "bad_messages", "'image_url'"),
        (request("a", messages=[{"role": "robot", "content": "x"}]), "bad_messages", "no role out of"),
        (chat("a", tools={"x": 1}), "bad_tools", "no list of objects"),
        (chat("a", tools=[TOOL], tool_choice="required"), "unsupported_field", 'tool_choice is "required"'),
        (chat("a", tool_choice={"type": "function"}), "unsupported_field", "it must be auto or none"),
        (chat("a", tools=[TOOL], response_format={"type": "json_object"}), "unsupported_field", "calls of tools"),
        (chat("a", chat_template_kwargs=[]), "bad_chat_template_kwargs", "must be an object"),
        (chat("a", reasoning_effort="low"), "unsupported_field", "never reads reasoning_effort"),
        (chat("a", seed="x"), "bad_value", 'seed is "x"'),
        (chat("a", seed=True), "bad_value", "seed is true"),
        (chat("a", seed=""), "bad_value", 'seed is ""'),
        (chat("a", temperature=-1), "bad_sampling_params", "temperature is -1"),
        (chat("a", top_logprobs=3), "bad_value", "top_logprobs is 3, and logprobs is not true; give both"),
        (chat("a", logprobs=True, top_logprobs=21), "bad_value", "top_logprobs is 21; it must be from 0 to 20"),
        (chat("a", logprobs=2), "bad_value", "logprobs is 2; it must be true or false"),
        (completion("a", logprobs=True), "bad_value", "logprobs is true; it must be from 0 to 20"),
        (chat("a", "x " * 500), "too_long", "max_model_len 200"),
        (request("a", "/v1/completions"), "bad_value", "prompt is null"),
        (completion("a", ""), "empty_prompt", "empty"),
        (completion("a", []), "empty_prompt", "no tokens"),
        (completion("a", ["x", "y"]), "unsupported_field", "a list of 2 prompts"),
        (completion("a", [[1], [2]]), "unsupported_field", "a list of 2 prompts"),
        (completion("a", [1, True]), "bad_value", "prompt is [1, true]"),
        (completion("a", [1, -1]), "bad_value", "token id -1"),
        (completion("a", [1, 10**9]), "bad_value", "token id 1000000000"),
        (completion("a", 5), "bad_value", "prompt is 5"),
        (completion("a", "x" * ((4 << 20) + 1)), "too_large", "4194305 bytes"),
        (completion("a", suffix="x"), "unsupported_field", 'suffix is "x"'),
        (chat("a", n=200), "bad_sampling_params", "n is 200; it must be from 1 to 128"),
        (completion("a", best_of=2), "unsupported_field", "best_of is 2"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(source: Source, line: Any, code: str, named: str) -> None:
    error = source.error(line)
    assert error.code == code and named in error.message


def test_wrong_lines_leave_the_others_as_they_are(source: Source) -> None:
    requests, errors = source(
        chat("a"), b"{", completion("b", "y"), chat("c"), chat("a"), completion("d", "z"), repeated={4: 1}
    )
    assert requests.rows.tolist() == [0, 2, 3, 5]
    assert {row: error.code for row, error in errors.items()} == {1: "invalid_json_line", 4: "duplicate_custom_id"}
    assert errors[1].message.startswith("line 2: ") and errors[4].message.startswith('line 5: custom_id "a" is that of')
    alone = [source.prompts(line)[0] for line in (chat("a"), completion("b", "y"), chat("c"), completion("d", "z"))]
    assert [ids.tolist() for ids in np.split(requests.token_ids, requests.offsets[1:-1])] == alone


def test_a_request_must_name_the_model(source: Source) -> None:
    for name in ("org/m", "m", None):
        assert len(source.params(chat("a", model=name), any_model=False)) == 1
    assert source.error(chat("a", model="gpt-4o"), any_model=False).code == "model_mismatch"
    assert len(source.params(chat("a", model="gpt-4o"))) == 1


def test_a_model_without_a_chat_template_completes(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save(tmp_path_factory.mktemp("plain"), None)
    (folder / "config.json").write_text("{}")
    requests, errors = Source(tmp_path, Tokenizer.load(folder))(chat("a"), completion("b"))
    assert requests.rows.tolist() == [1] and errors[0].code == "no_chat_template"


def test_tools_that_the_template_never_reads_are_refused(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = save(tmp_path_factory.mktemp("plain"), HYBRID + "{{ reasoning_effort }}")
    (folder / "config.json").write_text("{}")
    source = Source(tmp_path, Tokenizer.load(folder))
    assert "never reads tools" in source.error(chat("a", tools=[TOOL])).message
    low, high = source.prompts(chat("a", reasoning_effort="low"), chat("b", reasoning_effort="high"))
    assert low != high


def spoiled(line: dict[str, Any], chance: random.Random) -> Any:
    """A line with something wrong in it, or right by luck."""
    odd = [None, True, -1, 0, 1.5, 1e400, "", "x", "\ud800", [], [[]], [None], {}, {"a": []}, {"type": "text"}, "é" * 9]
    body = dict(line["body"])
    fields = [*body, "stop", "seed", "n", "logprobs", "tools", "response_format", "max_tokens", "temperature", "prompt"]
    where = chance.random()
    if where < 0.2:
        data = bytearray(json.dumps(line).encode())
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.choice([0, 34, 92, 123, 125, 255, 91])
        return bytes(data).replace(b"\n", b" ")
    if where < 0.3:
        return {**line, chance.choice([*line]): chance.choice(odd)}
    if where < 0.4:
        body["messages"] = [chance.choice([{"role": "user"}, {"content": 3}, *odd]) for _ in range(2)]
        return {**line, "body": body}
    return {**line, "body": {**body, chance.choice(fields): chance.choice(odd)}}


def test_no_line_ends_the_job(source: Source) -> None:
    chance = random.Random(0)
    good = [chat("a", temperature=0.5), completion("b"), chat("c", tools=[TOOL], stop=["x"], max_tokens=4)]
    lines = [spoiled(chance.choice(good), chance) for _ in range(900)]
    lines = [line for line in lines if not isinstance(line, bytes) or line.strip()]
    requests, errors = source(*lines)
    assert sorted([*requests.rows.tolist(), *errors]) == [*range(len(lines))]
    assert len({error.code for error in errors.values()}) > 10 and len(requests) > 50
    assert all(error.message for error in errors.values())
