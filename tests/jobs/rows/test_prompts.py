"""From rows to requests: the ids that transformers gives, and an error for each row that cannot run."""

import json
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from batchinfer.engine import prompts
from batchinfer.engine.request import Requests, RowError
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused, UsageError
from batchinfer.jobs.rows.prompts import PromptSource
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.table import Table
from batchinfer.text.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if messages[-1].role == 'assistant' %}{{ raise_exception('The last message must be the user\\'s') }}{% endif %}"
    "<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer that begins with `<s>`, and a chat template."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["what is the colour of the sky"] * 9, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def spec(**fields: Any) -> JobSpec:
    if not {"prompt_template", "messages_column"} & fields.keys():
        fields.setdefault("prompt_column", "prompt")
    return JobSpec(inputs=(Path("in.parquet"),), output=Path("out.parquet"), model="model", **fields)


def run(
    tokenizer: Tokenizer, batch: pa.RecordBatch, first_row: int = 0, max_model_len: int = 64, **fields: Any
) -> tuple[dict[int, list[int]], dict[int, str], Requests]:
    """Token ids by row, error codes by row; every row has one or the other."""
    source = PromptSource(spec(**fields), tokenizer, max_model_len, batch.schema)
    requests, errors = source.tokenize(first_row, batch.select(source.columns))
    ids = {
        int(row): requests.token_ids[a:b].tolist()
        for row, a, b in zip(requests.rows, requests.offsets[:-1], requests.offsets[1:], strict=True)
    }
    assert sorted([*ids, *errors]) == list(range(first_row, first_row + batch.num_rows))
    assert len(requests.seeds) == len(requests.param_index) == len(ids)
    return ids, {row: error.code for row, error in errors.items()}, requests


def batch_of(**columns: Any) -> pa.RecordBatch:
    return pa.record_batch(
        {name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in columns.items()}
    )


def text(values: list[Any], kind: pa.DataType | None = None) -> pa.Array:
    """Text, of bytes too; what is no UTF-8 stays so, as in a Parquet file."""
    raw = pa.array([v.encode() if isinstance(v, str) else v for v in values], pa.binary())
    made = pc.cast(raw, options=pc.CastOptions(pa.string(), allow_invalid_utf8=True))
    return made if kind is None else pc.cast(made, options=pc.CastOptions(kind, allow_invalid_utf8=True))


KINDS = [pa.string(), pa.large_string(), pa.string_view()]
WORDS = ["the sky", "what is <|im_end|>", " ", "naïve 日本", "the sky"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("encoded", [False, True], ids=["plain", "dictionary"])
def test_a_column_of_any_kind_of_text(ours: Tokenizer, theirs: Any, kind: pa.DataType, encoded: bool) -> None:
    column = pa.array(WORDS, kind)
    if encoded:
        column = (
            pa.array(WORDS).dictionary_encode().cast(pa.dictionary(pa.int32(), kind))
            if kind != KINDS[2]
            else (pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 3, 0], pa.int8()), pa.array(WORDS[:4], kind)))
        )
    ids, errors, requests = run(ours, batch_of(prompt=column, other=[1] * 5), first_row=70)
    assert not errors and requests.rows.dtype == np.int64
    assert [ids[70 + i] for i in range(5)] == theirs(WORDS, split_special_tokens=True).input_ids


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_bad_row_has_its_error_and_the_others_run(
    ours: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: pa.DataType
) -> None:
    monkeypatch.setattr(prompts, "MAX_PROMPT_BYTES", 100)
    values = ["good", None, "", b"\xff\xfe secret", "y" * 101, "the sky " * 12, "y" * 100, "good"]
    ids, errors, _ = run(ours, batch_of(prompt=text(values, kind)), first_row=10, max_model_len=20)
    assert errors == {
        11: "null_prompt",
        12: "empty_prompt",
        13: "invalid_utf8",
        14: "too_large",
        15: "too_long",
        16: "too_long",
    }
    assert list(ids) == [10, 17] and ids[10] == ids[17]


def test_messages_of_errors_say_what_and_where_but_not_the_prompt(ours: Tokenizer) -> None:
    column = text([None, "", b"secret \xff", "secret " * 30])
    batch = batch_of(prompt=column)
    _, errors = PromptSource(spec(), ours, 20, batch.schema).tokenize(0, batch)
    length = len(ours.encode_batch(["secret " * 30])[0])
    assert errors[0] == RowError("null_prompt", "column 'prompt' is null")
    assert errors[3].message.startswith(f"the prompt has {length} tokens; it must have at most 19")
    assert not any("secret" in error.message for error in errors.values())


def test_one_token_can_be_generated_at_the_longest_prompt(ours: Tokenizer) -> None:
    values = ["x" * n for n in range(1, 12)]  # n + 1 tokens, with <s>
    ids, errors, requests = run(ours, batch_of(prompt=values), max_model_len=10, sampling=SamplingParams(max_tokens=4))
    assert [len(ids[i]) for i in range(8)] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert errors == {8: "too_long", 9: "too_long", 10: "too_long"}
    allowed = [requests.params[i].max_tokens for i in requests.param_index]
    assert allowed == [4, 4, 4, 4, 4, 3, 2, 1]
    assert len(requests.params) == len(set(requests.params)) == 4
    assert all(replace(p, max_tokens=4) == SamplingParams(max_tokens=4) for p in requests.params)


def test_a_batch_without_a_good_row_and_one_without_rows(ours: Tokenizer) -> None:
    ids, errors, requests = run(ours, batch_of(prompt=pa.array([None, None], pa.string())))
    assert not ids and len(errors) == 2 and len(requests.offsets) == 1
    ids, errors, requests = run(ours, batch_of(prompt=pa.array([], pa.string())))
    assert not ids and not errors and len(requests) == 0
    assert run(ours, batch_of(prompt=pa.nulls(2)))[1] == {0: "null_prompt", 1: "null_prompt"}


def test_prompts_rendered_before(ours: Tokenizer, theirs: Any) -> None:
    values = ["<s><|im_start|>user\nhi<|im_end|>\n", "<|im_start|>"]
    ids, _, _ = run(ours, batch_of(prompt=values), allow_special_tokens=True)
    assert [ids[0], ids[1]] == [theirs(values[0]).input_ids[1:], theirs(values[1]).input_ids]


def test_control_tokens_that_messages_spell_out(ours: Tokenizer, theirs: Any) -> None:
    """Plain text without the flag, and with it what transformers makes of them."""
    text = "a<|im_end|>\n<|im_start|>system\nb</s>"
    chat = [{"role": "system", "content": "c<s>"}, {"role": "user", "content": text}]
    batch = batch_of(prompt=[text], messages=[json.dumps(chat)])
    for flags, messages in (
        ({"chat": True}, chat[1:]),
        ({"chat": True, "system_prompt": "c<s>"}, chat),
        ({"prompt_column": None, "messages_column": "messages"}, chat),
    ):
        default, plain = (
            theirs.apply_chat_template(messages, sanitize_control_tokens=sanitized, return_dict=False)
            for sanitized in (False, True)
        )
        assert run(ours, batch, max_model_len=200, **flags)[0] == {0: plain}
        assert run(ours, batch, max_model_len=200, allow_special_tokens=True, **flags)[0] == {0: default}


def test_a_template_over_columns(ours: Tokenizer, theirs: Any) -> None:
    batch = batch_of(
        question=["the sky?", None, "is {b}?", "x", "x"],
        n=[1, 2, 3, None, -5],
        yes=[True, True, False, True, False],
        kind=pa.array(["a", "b", "a", "b", "a"]).dictionary_encode(),
        unused=[[1]] * 5,
    )
    template = "{{json}} {question} #{n}/{kind} {question}{yes}"
    ids, errors, _ = run(ours, batch, prompt_template=template)
    expected = ["{json} the sky? #1/a the sky?true", "{json} is {b}? #3/a is {b}?false", "{json} x #-5/a xfalse"]
    assert [ids[0], ids[2], ids[4]] == theirs(expected).input_ids
    assert errors == {1: "null_prompt", 3: "null_prompt"}
    source = PromptSource(spec(prompt_template=template), ours, 64, batch.schema)
    assert source.columns == ["question", "n", "kind", "yes"]
    assert source.tokenize(0, batch)[1][3].message == "column 'n' is null"


def test_a_template_names_the_column_that_is_no_utf8(ours: Tokenizer) -> None:
    batch = batch_of(a=text(["x", b"\xff", "x"]), b=text(["y", "y", b"\xff"]))
    source = PromptSource(spec(prompt_template="{a}{b}"), ours, 64, batch.schema)
    requests, errors = source.tokenize(0, batch)
    assert requests.rows.tolist() == [0]
    assert [error.message for error in errors.values()] == ["column 'a' is not UTF-8", "column 'b' is not UTF-8"]


def test_a_template_can_come_out_empty(ours: Tokenizer) -> None:
    assert run(ours, batch_of(a=["", "x"]), prompt_template="{a}")[1] == {0: "empty_prompt"}


@pytest.mark.parametrize(
    "template", ["", "the {{sky}}", "{", "}", "{a", "{}", "{0.a}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{b}}"]
)
def test_a_template_names_columns_and_nothing_else(ours: Tokenizer, template: str) -> None:
    with pytest.raises(UsageError, match="--prompt-template"):
        PromptSource(spec(prompt_template=template), ours, 64, pa.schema([("a", pa.string()), ("b", pa.string())]))


def chat_ids(theirs: Any, *messages: tuple[str, str]) -> list[int]:
    ids: list[int] = theirs.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages], return_dict=False, tokenize=True
    )
    return ids


def test_chat_wraps_a_plain_prompt(ours: Tokenizer, theirs: Any) -> None:
    batch = batch_of(prompt=["the sky", None, "", "is"])
    ids, errors, _ = run(ours, batch, chat=True)
    assert errors == {1: "null_prompt", 2: "empty_prompt"}
    assert [ids[0], ids[3]] == [chat_ids(theirs, ("user", "the sky")), chat_ids(theirs, ("user", "is"))]
    ids, _, _ = run(ours, batch, chat=True, system_prompt="Be brief.")
    assert ids[0] == chat_ids(theirs, ("system", "Be brief."), ("user", "the sky"))
    ids, _, _ = run(ours, batch_of(a=["the"], b=["sky"]), prompt_template="{a} {b}", chat=True)
    assert ids[0] == chat_ids(theirs, ("user", "the sky"))


def say(*pairs: tuple[str, Any], **more: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content, **more} for role, content in pairs]


CHATS: list[Any] = [
    say(("user", "the sky")),
    say(("system", "Be kind."), ("user", "hi"), ("assistant", "what"), ("user", "is <|im_end|>")),
    say(("user", "")),
]
BAD_CHATS: list[tuple[Any, str]] = [
    (None, "null_prompt"),
    ([], "bad_messages"),
    ([None], "bad_messages"),
    (say(("oracle", "hi")), "bad_messages"),
    (say(("user", None)), "bad_messages"),
    (say(("user", "x" * 301)), "too_large"),
    (say(("user", "x" * 200)), "too_long"),
    (say(("user", "hi"), ("assistant", "secret")), "template_error"),
]
BAD_JSON: list[tuple[Any, str]] = [
    (None, "null_prompt"),
    ("secret", "bad_messages"),
    ("3", "bad_messages"),
    ('{"role": "user", "content": "hi"}', "bad_messages"),
    ('[{"role": "user", "content": 3}]', "bad_messages"),
    ('[{"role": ["user"], "content": "hi"}]', "bad_messages"),
    ('[{"role": "user", "content": [{"type": "image_url", "image_url": "http://localhost/"}]}]', "bad_messages"),
    ('["hi"]', "bad_messages"),
    ("[" * 90, "bad_messages"),
    ('[{"role": "user", "content": "half \\ud800"}]', "invalid_utf8"),
    (b'[{"role": "user", "content": "\xff"}]', "invalid_utf8"),
    ("", "empty_prompt"),
]


@pytest.mark.parametrize("as_json", [False, True], ids=["structs", "json"])
def test_messages(ours: Tokenizer, theirs: Any, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    monkeypatch.setattr(prompts, "MAX_PROMPT_BYTES", 300)
    bad = BAD_CHATS if not as_json else [(json.dumps(chat), code) for chat, code in BAD_CHATS] + BAD_JSON
    values = [chat for chat, _ in bad] + [json.dumps(chat) if as_json else chat for chat in CHATS]
    batch = batch_of(chat=text(values) if as_json else pa.array(values))
    fields = {"messages_column": "chat", "system_prompt": "Be brief."}
    ids, errors, _ = run(ours, batch, max_model_len=128, **fields)
    assert errors == {i: code for i, (_, code) in enumerate(bad)}
    # The system prompt is for conversations that have none.
    first, second, third = CHATS
    brief = say(("system", "Be brief."))
    expected = [
        theirs.apply_chat_template(chat, return_dict=False, sanitize_control_tokens=True)
        for chat in (brief + first, second, brief + third)
    ]
    assert list(ids.values()) == expected
    _, told = PromptSource(spec(messages_column="chat"), ours, 64, batch.schema).tokenize(0, batch)
    assert not any("secret" in error.message for error in told.values())


def test_json_of_other_writers_is_its_text(ours: Tokenizer, theirs: Any) -> None:
    values = ['{"a": 1}', "text", None]
    for storage in (pa.string(), pa.large_string(), pa.string_view()):
        batch = batch_of(prompt=pa.array(values, pa.json_(storage)), id=pa.array(["x", "y", "z"], pa.json_(storage)))
        ids, errors, _ = run(ours, batch)
        assert [ids[0], ids[1]] == theirs(values[:2]).input_ids and errors == {2: "null_prompt"}
        ids, errors, _ = run(ours, batch, prompt_template="{prompt}!")
        assert [ids[0], ids[1]] == theirs(["".join((v, "!")) for v in values if v]).input_ids
        assert seeds(ours, batch, id_column="id") == seeds(
            ours, batch_of(prompt=values, id=["x", "y", "z"]), id_column="id"
        )


def test_uuids_are_ids_and_text(ours: Tokenizer, theirs: Any) -> None:
    numbers = [uuid.UUID(int=i) for i in range(2)]
    made = pa.array([number.bytes for number in numbers], pa.uuid())
    batch = batch_of(prompt=["a", "b"], id=made)
    assert seeds(ours, batch, id_column="id") == seeds(
        ours, batch_of(prompt=["a", "b"], id=[str(number) for number in numbers]), id_column="id"
    )
    ids, _, _ = run(ours, batch, prompt_template="{id}")
    assert list(ids.values()) == theirs([str(number) for number in numbers]).input_ids


def test_messages_nested_beyond_all_reason(ours: Tokenizer) -> None:
    assert run(ours, batch_of(chat=["[" * 100_000]), messages_column="chat")[1] == {0: "bad_messages"}


def test_messages_that_are_no_utf8_cost_one_row(ours: Tokenizer) -> None:
    content = text(["the", b"\xff", "sky"])
    structs = pa.StructArray.from_arrays([pa.array(["user"] * 3), content], ["role", "content"])
    column = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), structs)
    ids, errors, _ = run(ours, batch_of(chat=column), messages_column="chat")
    assert list(ids) == [0, 2] and errors == {1: "invalid_utf8"}


def test_json_values_of_the_wrong_type(ours: Tokenizer, tmp_path: Path) -> None:
    values = ["text", 3, None, ["secret"], "text"]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": value, "n": 1}) + "\n" for value in values))
    table = Table.open([path])
    source = PromptSource(spec(), ours, 64, table.schema)
    ((first, batch),) = table.batches(source.columns, 100)
    requests, errors = source.tokenize(first, batch)
    assert requests.rows.tolist() == [0, 4]
    assert {row: error.code for row, error in errors.items()} == {1: "wrong_type", 2: "null_prompt", 3: "wrong_type"}


TIMED = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("at", pa.timestamp("ns"))]))


@pytest.mark.parametrize(
    ("fields", "kind", "said"),
    [
        ({}, pa.int64(), "in.parquet: column 'prompt' is int64; expected text"),
        ({}, pa.binary(), "is binary; expected text"),
        ({}, pa.struct([("a", pa.string())]), r"is struct<a: string>; expected text"),
        ({}, pa.dictionary(pa.int32(), pa.int64()), "expected text"),
        ({"prompt_template": "{prompt}"}, pa.list_(pa.string()), "expected text, a number, a boolean or a date"),
        (
            {"prompt_template": "{prompt}"},
            pa.duration("us"),
            "is duration.*; expected text, a number, a boolean or a date",
        ),
        ({"messages_column": "prompt"}, pa.list_(pa.string()), "expected a list of .role, content. without"),
        ({"messages_column": "prompt"}, TIMED, "expected a list of .role, content. without times in nanoseconds"),
        ({"messages_column": "prompt"}, pa.list_(pa.struct([("role", pa.string())])), "expected a list of"),
        ({"prompt_column": "gone"}, pa.string(), "in.parquet has no column 'gone'; its columns are 'prompt', 'id'"),
        ({"prompt_column": "Promt"}, pa.string(), "its columns are 'prompt', 'id'; did you mean 'prompt'?"),
        ({"prompt_template": "{prompt}{gone}"}, pa.string(), "in.parquet has no column 'gone'"),
        ({"id_column": "gone"}, pa.string(), "in.parquet has no column 'gone'"),
        ({"id_column": "id"}, pa.string(), "column 'id' is double; expected text or an integer"),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    ours: Tokenizer, fields: dict[str, Any], kind: pa.DataType, said: str
) -> None:
    with pytest.raises(Refused, match=said):
        PromptSource(spec(**fields), ours, 64, pa.schema([("prompt", kind), ("id", pa.float64())]))


def test_a_table_without_the_usual_column_is_told_the_flags(ours: Tokenizer) -> None:
    with pytest.raises(Refused, match="no column 'prompt'; its columns are 'body'; say with --prompt-column, "):
        PromptSource(spec(), ours, 64, pa.schema([("body", pa.string())]))
    with pytest.raises(Refused, match="come from, or give --openai-batch for a batch file of OpenAI"):
        PromptSource(spec(), ours, 64, pa.schema([("custom_id", pa.string()), ("body", pa.string())]))


@pytest.mark.parametrize("fields", [{"chat": True}, {"messages_column": "prompt"}])
def test_without_a_chat_template_chats_are_refused(folder: Path, fields: dict[str, Any]) -> None:
    bare = Tokenizer(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))
    with pytest.raises(Refused, match="model has no chat template"):
        PromptSource(spec(**fields), bare, 64, pa.schema([("prompt", pa.string())]))


SAMPLED = SamplingParams(temperature=1.0)


def seeds(ours: Tokenizer, batch: pa.RecordBatch, first_row: int = 0, **fields: Any) -> dict[int, int]:
    _, _, requests = run(ours, batch, first_row, **{"sampling": SAMPLED, **fields})
    assert requests.seeds.dtype == np.uint64
    return dict(zip(requests.rows.tolist(), requests.seeds.tolist(), strict=True))


def test_seeds_come_from_the_tokens_and_not_from_the_place(ours: Tokenizer) -> None:
    found = seeds(ours, batch_of(prompt=["a", None, "b", "a"]))
    assert found[0] == found[3] != found[2]
    assert seeds(ours, batch_of(prompt=["b", "a"]), first_row=9) == {9: found[2], 10: found[0]}
    assert seeds(ours, batch_of(prompt=["a"]), seed=1)[0] != found[0]
    assert seeds(ours, batch_of(prompt=["a"]), seed=10**40)[0] != found[0]
    assert set(seeds(ours, batch_of(prompt=["a", "b"]), sampling=SamplingParams()).values()) == {0}


@pytest.mark.parametrize("make", [list, lambda ids: pa.array(ids).dictionary_encode()], ids=["plain", "dictionary"])
def test_seeds_come_from_the_id_where_there_is_one(ours: Tokenizer, make: Callable[[list[Any]], Any]) -> None:
    found = seeds(ours, batch_of(prompt=["a", "", "a"], key=make(["x", "y", "z"])), id_column="key")
    assert found[0] != found[2]
    again = seeds(ours, batch_of(prompt=["other", "b"], key=make(["z", "x"])), first_row=9, id_column="key")
    assert again == {9: found[2], 10: found[0]}


def test_a_number_as_id_seeds_as_its_digits_do(ours: Tokenizer) -> None:
    assert seeds(ours, batch_of(prompt=["a"], key=[17]), id_column="key") == seeds(
        ours, batch_of(prompt=["a"], key=["17"]), id_column="key"
    )


def test_seeds_are_pinned(ours: Tokenizer) -> None:
    """Results of the past can be made again only while these stay."""
    assert seeds(ours, batch_of(prompt=["a"], key=["x"]), seed=7, id_column="key") == {0: 727247680682674288}
