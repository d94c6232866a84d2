"""Conversations and tools of one row: the ids of transformers for that row alone, whatever the other rows hold."""

import json
from pathlib import Path
from typing import Any

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from chat_models import CHATML, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchinfer.errors import Refused
from batchinfer.jobs.rows.prompts import PromptSource, verbatim_columns
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.table import Table
from batchinfer.text.tokenizer import Tokenizer

# This template does as Qwen 2.5's: tools first, as JSON; calls as JSON too, in place of content or behind it.
TOOLS = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content %}{{ m.content }}{% endif %}{% for call in m.tool_calls or [] %}
<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tools"), TOOLS)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


Ids = dict[int, list[int]]


def prompts_of(tokenizer: Tokenizer, path: Path, shard: tuple[int, int] | None = None, **fields: Any) -> Any:
    """Token ids by row, and error codes by row, as a job makes them from the file."""
    given = {"messages_column": "messages", **fields}
    spec = JobSpec(inputs=(path,), output=path.with_name("out.parquet"), model="model", **given)
    table = Table.open([path], verbatim=verbatim_columns(spec))
    table = table if shard is None else table.shard(*shard)
    source = PromptSource(spec, tokenizer, 4096, table.schema)
    ids: Ids = {}
    errors: dict[int, str] = {}
    for first, batch in table.batches(source.columns, 3):
        requests, failed = source.tokenize(first, batch)
        for i, row in enumerate(requests.rows.tolist()):
            ids[row] = requests.token_ids[requests.offsets[i] : requests.offsets[i + 1]].tolist()
        errors |= {row: error.code for row, error in failed.items()}
    return ids, errors


def theirs_of(theirs: Any, messages: Any, tools: Any = None) -> list[int]:
    ids: list[int] = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    return ids


def json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def calling(name: str, arguments: Any, **more: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "user", "content": "go on"},
        {"role": "assistant", "tool_calls": [call], **more},
        {"role": "tool", "content": "done"},
    ]


ARGUMENTS: list[Any] = [
    {"city": "Bonn", "days": 3},
    {"hour": 7},
    {"days": 1.5, "city": "Kiel é"},
    {"hour": 7, "label": None},
    {},
    {"deep": {"b": [1, "x"], "a": 2**70}},
    "text",
    {"hour": "seven"},
]


# Objects that a struct could hold, and others that it could not.
@pytest.mark.parametrize("given", [ARGUMENTS[:4], ARGUMENTS], ids=["alike", "odd"])
def test_arguments_are_those_of_the_row_alone(tmp_path: Path, ours: Tokenizer, theirs: Any, given: list[Any]) -> None:
    chats = [calling("f", arguments, content="") for arguments in given]
    path = json_lines(tmp_path / "in.jsonl", [{"messages": chat} for chat in chats])
    expected = {i: theirs_of(theirs, chat) for i, chat in enumerate(chats)}
    assert prompts_of(ours, path) == (expected, {})
    halves = [prompts_of(ours, path, (i, 2))[0] for i in range(2)]
    assert [*halves[0].values(), *halves[1].values()] == list(expected.values())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, max_size=3),
    max_leaves=5,
)
numbers = st.integers(-9, 9) | st.floats(-9, 9)
objects = st.dictionaries(st.sampled_from(["a", "b", "c"]), numbers, min_size=1)
contents = st.none() | st.just("said") | st.lists(st.just({"type": "text", "text": "part"}), max_size=2)
alike = st.builds(lambda arguments: calling("f", arguments, content="said"), objects)
odd = st.builds(lambda arguments, content: calling("f", arguments, content=content), json_values, contents)
tables = st.lists(alike, min_size=1, max_size=6) | st.lists(
    odd | odd.map(json.dumps) | st.none(), min_size=1, max_size=6
)
quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(tables)
def test_a_prompt_is_the_same_alone_and_among_others(tmp_path: Path, ours: Tokenizer, table: list[Any]) -> None:
    ids, errors = prompts_of(ours, json_lines(tmp_path / "in.jsonl", [{"messages": chat} for chat in table]))
    for i, chat in enumerate(table):
        alone, failed = prompts_of(ours, json_lines(tmp_path / "one.jsonl", [{"messages": chat}]))
        assert (alone.get(0), failed.get(0)) == (ids.get(i), errors.get(i))


cells = st.integers() | st.floats() | st.booleans() | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)


@quick
@given(st.lists(cells | st.lists(cells, max_size=2), min_size=1, max_size=6))
def test_a_template_over_columns_too(tmp_path: Path, ours: Tokenizer, values: list[Any]) -> None:
    fields = {"messages_column": None, "prompt_template": "<{x}>"}
    ids, errors = prompts_of(ours, json_lines(tmp_path / "in.jsonl", [{"x": value} for value in values]), **fields)
    for i, value in enumerate(values):
        alone, failed = prompts_of(ours, json_lines(tmp_path / "one.jsonl", [{"x": value}]), **fields)
        assert (alone.get(0), failed.get(0)) == (ids.get(i), errors.get(i))


@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": ""}], ids=["null", "absent", "empty"])
def test_a_call_needs_no_content(tmp_path: Path, ours: Tokenizer, theirs: Any, content: dict[str, Any]) -> None:
    chat = calling("f", {"a": 1}, **content)
    expected = {0: theirs_of(theirs, chat)}
    assert prompts_of(ours, json_lines(tmp_path / "in.jsonl", [{"messages": chat}])) == (expected, {})
    pq.write_table(pa.table({"messages": [chat]}), tmp_path / "in.parquet")
    assert prompts_of(ours, tmp_path / "in.parquet") == ({0: theirs_of(theirs, as_read(tmp_path, "messages"))}, {})


def as_read(folder: Path, column: str) -> Any:
    """The first value of a column, as Python reads it from Parquet: with null for what a struct lacks."""
    return pq.read_table(folder / "in.parquet")[column][0].as_py()


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "user"}, "message 0 has neither content nor tool_calls"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "message 0 has neither content nor tool_calls"),
        ({"role": "user", "content": 3}, "the content of message 0 is neither text nor a list of parts"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "has a part of type 'image_url'; only"),
        (
            {"role": "user", "content": [{"type": "input_audio"}]},
            "has a part of type 'input_audio'; only text is taken",
        ),
        ({"role": "user", "content": [{"type": "a secret\n"}]}, "has a part without a type; only text is taken"),
        ({"role": "user", "content": ["text"]}, "has a part without a type; only text is taken"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "has a text part without a text"),
    ],
)
def test_what_is_no_message_is_named(ours: Tokenizer, message: dict[str, Any], said: str) -> None:
    spec = JobSpec(inputs=(Path("in.parquet"),), output=Path("o.parquet"), model="model", messages_column="messages")
    batch = pa.record_batch({"messages": [json.dumps([message])]})
    _, errors = PromptSource(spec, ours, 4096, batch.schema).tokenize(0, batch)
    assert errors[0].code == "bad_messages" and said in errors[0].message and "secret" not in errors[0].message


PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]}]
TEXT = [{"role": "user", "content": "one two"}]


@pytest.mark.parametrize("kind", ["jsonl", "json text", "structs"])
def test_content_in_parts(tmp_path: Path, ours: Tokenizer, theirs: Any, kind: str) -> None:
    path = tmp_path / ("in.jsonl" if kind == "jsonl" else "in.parquet")
    if kind == "jsonl":
        json_lines(path, [{"messages": chat} for chat in (PARTS, TEXT)])
    else:
        chats = [json.dumps(PARTS), json.dumps(TEXT)] if kind == "json text" else [PARTS, PARTS]
        pq.write_table(pa.table({"messages": chats}), path)
    assert prompts_of(ours, path) == (dict.fromkeys(range(2), theirs_of(theirs, TEXT)), {})


def test_messages_of_other_writers_are_their_text(tmp_path: Path, ours: Tokenizer, theirs: Any) -> None:
    path, text = tmp_path / "in.parquet", json.dumps(TEXT)
    expected = {0: theirs_of(theirs, TEXT)}
    duckdb.sql(f"copy (select '{text}'::json as messages) to '{path}' (format parquet)")
    assert isinstance(pq.read_schema(path).field("messages").type, pa.JsonType)
    assert prompts_of(ours, path) == (expected, {})
    polars.DataFrame({"messages": [TEXT]}).write_parquet(path)
    assert prompts_of(ours, path) == (expected, {})
    for storage in (pa.string(), pa.large_string(), pa.string_view()):
        pq.write_table(pa.table({"messages": pa.array([text], pa.json_(storage))}), path)
        assert prompts_of(ours, path) == (expected, {})
    words = pa.StructArray.from_arrays(
        [pa.array(["user"]).dictionary_encode(), pa.array(["one two"], pa.string_view())], ["role", "content"]
    )
    pq.write_table(pa.table({"messages": pa.LargeListArray.from_arrays([0, 1], words)}), path)
    assert prompts_of(ours, path) == (expected, {})


TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
}
OTHER = {"type": "function", "function": {"name": "g", "strict": True}}


@pytest.mark.parametrize("kind", ["jsonl", "json text", "duckdb", "csv"])
def test_tools_of_a_row(tmp_path: Path, ours: Tokenizer, theirs: Any, kind: str) -> None:
    tools: list[Any] = [[TOOL], None, [OTHER, TOOL], []]
    texts = [None if each is None else json.dumps(each) for each in tools]
    path = tmp_path / {"jsonl": "in.jsonl", "csv": "in.csv"}.get(kind, "in.parquet")
    if kind == "jsonl":
        json_lines(path, [{"prompt": "hi", "tools": each} for each in tools])
    elif kind == "csv":
        polars.DataFrame({"prompt": ["hi"] * 4, "tools": texts}).write_csv(path)
    else:
        made = pa.array(texts, pa.json_() if kind == "duckdb" else pa.string())
        pq.write_table(pa.table({"prompt": ["hi"] * 4, "tools": made}), path)
    fields = {"messages_column": None, "prompt_column": "prompt", "chat": True, "tools_column": "tools"}
    hi = [{"role": "user", "content": "hi"}]
    expected = {i: theirs_of(theirs, hi, each) for i, each in enumerate(tools)}
    assert prompts_of(ours, path, **fields) == (expected, {})
    assert expected[0] != expected[1] == expected[3]


def test_tools_as_structs(tmp_path: Path, ours: Tokenizer, theirs: Any) -> None:
    pq.write_table(pa.table({"messages": [TEXT, TEXT], "tools": [[TOOL], None]}), tmp_path / "in.parquet")
    expected = {0: theirs_of(theirs, TEXT, as_read(tmp_path, "tools")), 1: theirs_of(theirs, TEXT)}
    assert prompts_of(ours, tmp_path / "in.parquet", tools_column="tools") == (expected, {})


@pytest.mark.parametrize("tools", ["{}", "3", "[3]", "no json", "[" * 90, '["f"]'])
def test_bad_tools_are_an_error_of_their_row(tmp_path: Path, ours: Tokenizer, tools: str) -> None:
    pq.write_table(pa.table({"messages": [TEXT, TEXT], "tools": [tools, json.dumps([TOOL])]}), tmp_path / "in.parquet")
    ids, errors = prompts_of(ours, tmp_path / "in.parquet", tools_column="tools")
    assert list(ids) == [1] and errors == {0: "bad_tools"}


def nested(content: pa.DataType) -> pa.DataType:
    return pa.list_(pa.struct([("role", pa.string()), ("content", content)]))


LATER = pa.struct([("type", pa.string()), ("text", pa.string()), ("at", pa.timestamp("ns"))])


@pytest.mark.parametrize(
    ("messages", "tools", "said"),
    [
        (nested(pa.list_(pa.string())), pa.string(), "messages whose content is a list of string; expected text, or a"),
        (nested(pa.int64()), pa.string(), "messages whose content is int64; expected text, or a list of parts"),
        (nested(pa.list_(LATER)), pa.string(), "without times in nanoseconds"),
        (pa.int64(), pa.string(), "column 'messages' is int64; expected a list of"),
        (pa.string(), pa.int64(), "column 'tools' is int64; expected a list of structs"),
        (pa.string(), pa.list_(pa.string()), "column 'tools' is list<.*>; expected a list of structs"),
        (pa.string(), None, "has no column 'tools'"),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    ours: Tokenizer, messages: pa.DataType, tools: pa.DataType | None, said: str
) -> None:
    fields = {"messages_column": "messages", "tools_column": "tools"}
    spec = JobSpec(inputs=(Path("in.parquet"),), output=Path("out.parquet"), model="model", **fields)  # type: ignore[arg-type]
    columns = [("messages", messages)] + ([] if tools is None else [("tools", tools)])
    with pytest.raises(Refused, match=said):
        PromptSource(spec, ours, 64, pa.schema(columns))


def test_a_template_tells_whether_it_reads_tools(tmp_path: Path) -> None:
    for template, reads in ((TOOLS, True), (CHATML, False), ("{% if not tools is defined %}{% endif %}", True)):
        found = Tokenizer.load(save(tmp_path, template)).template
        assert found is not None and found.reads_tools == reads
