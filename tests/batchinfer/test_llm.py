"""`LLM`: right by transformers and by a job, in the order of the prompts, and a good guest in its process."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from chat_models import CHATML, HYBRID, LLAMA_2, LLAMA_3, OPENED, chat_model, save
from engines import assert_blocks_are_free
from repository import TARGET

import batchinfer
from batchinfer import LLM, Completion, SamplingParams
from batchinfer.engine.config import Speculation
from batchinfer.errors import Refused
from batchinfer.jobs.job import run
from batchinfer.jobs.spec import JobSpec

TEXTS = ["Hello", "the user and the assistant", "日本語", "a model of the system " * 9, "Hello", "x"]
CHAT = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Hello <|im_end|> there"}]
TALK = [{"role": "user", "content": "Hello there"}]
GREEDY = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(make_model, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, device="cpu", max_num_seqs=4)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def answers(completions: list[Completion]) -> list[tuple[str | None, list[int]]]:
    return [(completion.text, completion.token_ids) for completion in completions]


def test_greedy_text_is_that_of_transformers(folder: Path, llm: LLM, theirs: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = llm.generate(TEXTS, GREEDY)
    assert [completion.index for completion in found] == list(range(len(TEXTS)))
    for text, completion in zip(TEXTS, found, strict=True):
        ids = theirs(text, return_tensors="pt").input_ids
        with torch.no_grad():
            new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
        assert completion.token_ids == new
        assert completion.text == theirs.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert completion.prompt_tokens == ids.shape[1]
        assert completion.finish_reason == ("stop" if new[-1] == theirs.eos_token_id else "length")


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_answers_are_those_of_a_job(tmp_path: Path, temperature: float) -> None:
    prompts = ["def tell(self):\n", 'def add(a, b):\n    """Sum."""\n', "", "class Stack:\n", "def tell(self):\n"]
    params = SamplingParams(max_tokens=24, temperature=temperature, stop=["\n\n"])  # type: ignore[arg-type]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in.parquet")
    spec = JobSpec(
        inputs=(tmp_path / "in.parquet",),
        output=tmp_path / "out.parquet",
        model=str(TARGET),
        prompt_column="prompt",
        sampling=params,
        quantization="w8a8-int8",
        seed=3,
        device="cpu",
    )
    run(spec)
    found = LLM(TARGET, quantization="w8a8-int8", device="cpu").generate(prompts, params, seed=3)
    for completion, row in zip(found, pq.read_table(spec.output).to_pylist(), strict=True):
        assert (completion.text, completion.finish_reason) == (row["generated_text"], row["finish_reason"])
        assert completion.error is None or completion.error.code == row["error_code"]
        assert completion.prompt_tokens == (row["prompt_tokens"] or 0)
    assert found[0] == Completion(0, found[4].text, found[4].token_ids, found[4].finish_reason, found[4].prompt_tokens)
    assert any("\n\n" in llm_text for llm_text in _decoded(found)) or temperature, "or no stop string was met"


def _decoded(found: list[Completion]) -> list[str]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TARGET)
    return [tokenizer.decode(completion.token_ids) for completion in found]


def test_messages_are_rendered_as_by_transformers(llm: LLM, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[int]] = []
    add = llm._engine.add

    def watched(requests: Any) -> None:
        given.extend(requests.token_ids[a:b].tolist() for a, b in pairwise(requests.offsets))
        add(requests)

    monkeypatch.setattr(llm._engine, "add", watched)
    plain = [CHAT[0], {"role": "user", "content": "Hello there"}]
    ids = theirs.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    found = llm.generate([plain, ids, "Hello"], GREEDY)
    assert given == [ids, ids, theirs("Hello").input_ids]
    assert answers(found)[0] == answers(found)[1] != answers(found)[2]
    # The text of a control token in a message is text.
    (completion,) = llm.generate([CHAT], GREEDY)
    assert completion.prompt_tokens > len(
        theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    )


def test_a_template_of_ones_own_gets_arguments(folder: Path, tmp_path: Path, llm: LLM) -> None:
    (tmp_path / "own.jinja").write_text(HYBRID)
    own = LLM(folder, device="cpu", max_num_seqs=4, chat_template=tmp_path / "own.jinja")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    lengths = []
    for arguments in ({}, {"enable_thinking": False}):
        (found,) = own.generate([TALK], GREEDY, chat_template_kwargs=arguments)
        ids = theirs.apply_chat_template(
            TALK, chat_template=HYBRID, add_generation_prompt=True, return_dict=False, **arguments
        )
        lengths.append(found.prompt_tokens)
        assert found.prompt_tokens == len(ids)
    assert lengths[0] < lengths[1]
    assert not any("chat_template_kwargs" in note for note in own.stats().notes)
    llm.generate([TALK], GREEDY, chat_template_kwargs={"enable_thinking": False})
    assert any("never reads enable_thinking" in note for note in llm.stats().notes)
    with pytest.raises(ValueError, match="chat_template_kwargs has 'tools', a name that is reserved"):
        llm.generate([TALK], chat_template_kwargs={"tools": []})


def test_thinking_that_the_prompt_opens_is_no_answer(folder: Path, tmp_path: Path, llm: LLM) -> None:
    (tmp_path / "own.jinja").write_text(OPENED)
    own = LLM(folder, device="cpu", max_num_seqs=4, chat_template=tmp_path / "own.jinja")
    thinking, closed = (
        own.generate([TALK, "Hello"], GREEDY, chat_template_kwargs=arguments) for arguments in ({}, {"thinking": False})
    )
    assert thinking[0].text == "" and thinking[0].reasoning
    assert closed[0].text and closed[0].reasoning is None
    assert thinking[1] == closed[1] and thinking[1].text and thinking[1].reasoning is None
    whole = LLM(
        folder, device="cpu", max_num_seqs=4, chat_template=tmp_path / "own.jinja", reasoning_parser="none"
    ).generate([TALK], GREEDY)
    assert whole[0].text and whole[0].reasoning is None and whole[0].token_ids == thinking[0].token_ids
    short = own.generate([TALK], SamplingParams(max_tokens=12, ignore_eos=True, max_thinking_tokens=4))
    closing = own.tokenizer.added_tokens["</think>"]
    assert short[0].token_ids[:5] == [*thinking[0].token_ids[:4], closing]
    assert short[0].reasoning and short[0].text and short[0].reasoning in str(thinking[0].reasoning)

    (held,) = own.generate([TALK], SamplingParams(max_tokens=8, regex="[ab]{3}"))
    assert held.text and set(held.text) <= set("ab") and held.reasoning is None, "a form leaves no room for thinking"
    with pytest.raises(ValueError, match="max_thinking_tokens closes thinking, and regex leaves none"):
        own.generate([TALK], SamplingParams(regex="a", max_thinking_tokens=2))
    with pytest.raises(ValueError, match="max_thinking_tokens needs a reasoning_parser"):
        llm.generate([TALK], SamplingParams(max_thinking_tokens=4))
    with pytest.raises(ValueError, match="reasoning_parser is 'x'; it must be one of auto, none, harmony"):
        LLM(folder, reasoning_parser="x")


def test_tools_are_for_every_conversation(folder: Path, tmp_path: Path, llm: LLM) -> None:
    tools, chat = [{"type": "function", "function": {"name": "f"}}], [{"role": "user", "content": "Hello"}]
    shutil.copytree(folder, tmp_path / "model")
    save(tmp_path / "model", "{{ tools | tojson if tools else 'none' }}" + CHATML)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    reads = LLM(tmp_path / "model", device="cpu", max_num_seqs=4)
    expected = [
        len(theirs.apply_chat_template(chat, tools=each, add_generation_prompt=True, return_dict=False))
        for each in (tools, None)
    ]
    assert [c.prompt_tokens for c in reads.generate([chat, "x", chat], GREEDY, tools=tools)][::2] == [expected[0]] * 2
    assert reads.generate([chat], GREEDY)[0].prompt_tokens == expected[1] < expected[0]
    assert not any("tools" in note for note in reads.stats().notes)
    llm.generate([chat], GREEDY, tools=tools)
    assert any("never reads tools" in note for note in llm.stats().notes)
    llm.generate(["x"], GREEDY, tools=tools)
    assert any("in vain: none of the prompts is a conversation" in note for note in llm.stats().notes)
    for bad in ({}, "f", [3], 3, [{"name": "\ud800"}]):
        with pytest.raises(ValueError, match="tools is"):
            llm.generate([chat], tools=bad)  # type: ignore[arg-type]


def test_content_may_be_in_parts(llm: LLM) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    found = llm.generate([[{"role": "user", "content": content}] for content in (parts, "Hello")], GREEDY)
    assert answers(found)[0] == answers(found)[1] and found[0].error is None


def test_completions_come_as_rows_end(llm: LLM) -> None:
    """Four rows at once, of which the long prompt's own place says nothing about when it ends."""
    prompts = [*TEXTS, None, *TEXTS]
    in_order = llm.generate(prompts, GREEDY)
    stream = llm.stream(prompts, GREEDY)
    first = next(stream)
    assert first.error is not None and first.index == 6, "what cannot run is known before the first step"
    assert llm._engine.unfinished == 12
    next(stream)
    assert 0 < llm._engine.unfinished < 12, "the first rows are there before the last have begun"
    rest = {completion.index: completion for completion in stream}
    assert all(in_order[index] == completion for index, completion in rest.items()) and len(rest) == 11


BAD: dict[str, tuple[Any, str]] = {
    "null": (None, "null_prompt"),
    "no text": (7.5, "wrong_type"),
    "empty": ("", "empty_prompt"),
    "nothing": ([], "empty_prompt"),
    "surrogate": ("\ud800", "invalid_utf8"),
    "too long": ("x " * 600, "too_long"),
    "too large": ("x" * (5 << 20), "too_large"),
    "token": ([5, 520], "bad_token_ids"),
    "huge token": ([5, 1 << 70], "bad_token_ids"),
    "role": ([{"role": "poet", "content": "x"}], "bad_messages"),
    "content": ([{"role": "user", "content": None}], "bad_messages"),
    "mixed": ([{"role": "user", "content": "x"}, 5], "bad_messages"),
    "surrogate in messages": ([{"role": "user", "content": "\udfff"}], "invalid_utf8"),
}


def test_prompts_that_cannot_run_have_errors_and_the_others_answers(llm: LLM) -> None:
    prompts = [part for prompt, _ in BAD.values() for part in (prompt, "Hello")]
    found = llm.generate(prompts, GREEDY)
    assert [c.error and c.error.code for c in found[::2]] == [code for _, code in BAD.values()]
    assert {(c.text, tuple(c.token_ids), c.finish_reason, c.prompt_tokens) for c in found[::2]} == {
        (None, (), "error", 0)
    }
    assert answers(found[1::2]) == answers(llm.generate(["Hello"], GREEDY)) * len(BAD)
    assert llm.generate([]) == []


def test_a_template_that_raises_is_that_prompts_error(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    llm = LLM(save(tmp_path / "model", LLAMA_2))
    twice = [{"role": "user", "content": "x"}] * 2
    good, bad = llm.generate([[*twice[:1]], twice], GREEDY)
    assert good.error is None and bad.error is not None
    assert bad.error.code == "template_error" and "roles must alternate" in bad.error.message


def test_a_template_takes_the_moment_that_is_given(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    save(tmp_path / "model", LLAMA_3)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for year in ("2019", "2031"):
        llm = LLM(tmp_path / "model", device="cpu", template_date=datetime(int(year), 5, 6))
        as_of = LLAMA_3.replace('strftime_now("%Y")', f'"{year}"')
        ids = theirs.apply_chat_template(TALK, chat_template=as_of, add_generation_prompt=True, return_dict=False)
        assert [ids] == [found.tolist() for found in llm.tokenizer.encode_chats([TALK])[:1]]


def test_what_is_dropped_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(llm.generate(TEXTS, GREEDY))
    stream = llm.stream([*TEXTS, *TEXTS], GREEDY)
    next(stream)
    with pytest.raises(ValueError, match="another stream of this LLM is under way"):
        llm.generate(TEXTS, GREEDY)
    stream.close()  # type: ignore[attr-defined]
    assert_blocks_are_free(llm._engine)
    assert answers(llm.generate(TEXTS, GREEDY)) == expected

    launch, steps = llm._engine.runner.launch, iter(range(3))

    def interrupted(batch: Any) -> Any:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return launch(batch)

    monkeypatch.setattr(llm._engine.runner, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(TEXTS, GREEDY)
    monkeypatch.undo()
    assert_blocks_are_free(llm._engine)
    assert answers(llm.generate(TEXTS, GREEDY)) == expected


def test_the_seed_decides_what_is_drawn(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0)
    drawn = [answers(llm.generate(TEXTS, params, seed=seed)) for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device": "tpu"}, "device is 'tpu'; it must be one of auto, cpu, cuda"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"quantization": None}, "quantization is None; it must be a text"),
        ({"quantization": "w3a3"}, "quantization is 'w3a3'"),
        ({"max_model_len": 1024}, "max_model_len is 1024"),
        ({"max_num_seqs": "8"}, "max_num_seqs is '8'; it must be a whole number"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0"),
        ({"template_date": "2026-11-28"}, "template_date is '2026-11-28'; it must be a datetime"),
        ({"gpu_memory_utilization": "most"}, "gpu_memory_utilization is 'most'; it must be a number"),
    ],
)
def test_a_wrong_argument_is_named(folder: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        LLM(folder, **{"device": "cpu", **arguments})
    assert words in str(error.value)


@pytest.mark.parametrize("prompts", ["Hello", CHAT, [5, 6], 5, {"role": "user", "content": "x"}])
def test_a_prompt_that_is_in_no_list_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(ValueError, match=r"prompts is .* it must be a list"):
        llm.generate(prompts)


@pytest.mark.parametrize("fields", [{"stop": "\n"}, {"stop": [5]}, {"max_tokens": 8.5}, {"temperature": "hot"}])
def test_params_of_another_kind_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(fields))} is "):
        SamplingParams(**fields)


def test_calls_are_checked_when_they_are_made(llm: LLM) -> None:
    with pytest.raises(ValueError, match="params is"):
        llm.stream(["x"], {"max_tokens": 5})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed is -1"):
        llm.stream(["x"], seed=-1)


def test_models_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no such directory"):
        LLM(tmp_path / "nothing")
    shutil.copytree(folder, tmp_path / "model")
    save(tmp_path / "model", None)
    with pytest.raises(ValueError, match=r"prompts\[1\] is a conversation, and the model has no chat template"):
        LLM(tmp_path / "model").generate(["x", CHAT])
    with pytest.raises(Refused, match=r"draft model .* has another tokenizer"):
        LLM(folder, speculation=Speculation(model=TARGET))


GUEST = """
import json, os, signal, sys, warnings
before = dict(os.environ)
import torch

torch.set_num_threads(1)
torch.manual_seed(7)

def state():
    return [
        torch.get_num_threads(), str(torch.get_default_dtype()), torch.get_rng_state().tolist(),
        [str(signal.getsignal(number)) for number in signal.valid_signals()], list(map(str, warnings.filters)),
        torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(),
    ]

at_first = state()
from batchinfer.host import allocator
settings = []
allocator._mallopt = lambda *setting: settings.append(setting)
from batchinfer import LLM, SamplingParams

imported = state()
llm = LLM(sys.argv[1], quantization="w8a8-int8", device="cpu")
chat = [{"role": "user", "content": "Hello"}]
found = llm.generate(["Hello", chat, None], SamplingParams(max_tokens=4, temperature=0.5))
assert [completion.error is None for completion in found] == [True, True, False]
stats = llm.stats()
assert stats.peak_operations_per_second > 0
print(json.dumps([dict(os.environ) == before, imported == at_first, state() == at_first, settings, stats.notes]))
"""


def test_nothing_is_changed_behind_the_users_back(folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    command = [sys.executable, "-c", GUEST, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *unchanged, settings, notes = json.loads(done.stdout)
    assert unchanged == [True, True, True] and settings == []
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    assert ["MKL is not in its strict mode" in note for note in notes] == [True] * intel


def test_the_names_are_loaded_when_they_are_asked_for() -> None:
    code = "import sys, batchinfer; print('torch' in sys.modules); batchinfer.LLM; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        batchinfer.Nothing  # noqa: B018
