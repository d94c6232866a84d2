"""Answers that follow grammars: what ends by itself is valid, and no way of going faster changes a token."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from chat_models import chat_model
from drafters import Adversary
from engines import engine_of, prompts_of, run
from gguf_models import write_model
from schemas import SCHEMAS

from batchinfer.engine.config import Speculation
from batchinfer.engine.engine import Engine
from batchinfer.engine.request import FinishReason, Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import SamplingTable
from batchinfer.llm import LLM
from batchinfer.text.tokenizer import Tokenizer

Rows = dict[int, tuple[list[int], FinishReason]]

RECORD: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "ok"],
}


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(make_model, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.load(model)


def plain(model: Path, tokenizer: Tokenizer, **settings: Any) -> Engine:
    return engine_of(model, tokenizer, speculation=Speculation("off"), forced_tokens=False, **settings)


def text(tokenizer: Tokenizer, answer: tuple[list[int], FinishReason]) -> str:
    return tokenizer.decode_batch(np.array(answer[0], np.int32), np.array([0, len(answer[0])]))[0]


def mixed(params: Sequence[SamplingParams], prompts: list[list[int]]) -> Requests:
    """Row i has params i, counted around."""
    requests = Requests.of(prompts, params[0], seeds=range(len(prompts)))
    index = np.arange(len(prompts), dtype=np.int32) % len(params)
    return replace(requests, params=SamplingTable.of(params), param_index=index)


def test_every_answer_that_ends_by_itself_is_valid(model: Path, tokenizer: Tokenizer) -> None:
    schemas = [json.dumps(schema) for schema in SCHEMAS.values()]
    params = [SamplingParams(max_tokens=150, temperature=1.0, json_schema=schema) for schema in schemas]
    found = run(engine_of(model, tokenizer), mixed(params, prompts_of(90, 30)))
    ended = 0
    for row, answer in found.items():
        if answer[1] is FinishReason.STOP:
            schema = list(SCHEMAS.values())[row % len(SCHEMAS)]
            jsonschema.validate(json.loads(text(tokenizer, answer)), schema)
            ended += 1
        else:
            assert answer[1] is FinishReason.LENGTH and len(answer[0]) == 150
    assert ended > 60


WAYS: dict[str, dict[str, Any]] = {
    "forced": {"speculation": Speculation("off")},
    "drafts": {"forced_tokens": False, "speculation": Speculation("auto", 5, gate=False)},
    "forced and drafts": {"speculation": Speculation("auto", 5, gate=False)},
    "alone": {"max_num_seqs": 1},
}


@pytest.fixture(scope="module", params=[0.0, 1.0])
def truth(model: Path, tokenizer: Tokenizer, request: pytest.FixtureRequest) -> tuple[Requests, Rows]:
    """Rows that follow schemas, expressions and grammars, beside free ones, with twins; and their plain answers."""
    base = SamplingParams(max_tokens=70, temperature=request.param)
    params = (
        replace(base, json_schema=json.dumps(RECORD)),
        base,
        replace(base, regex=r"(yes|no), because [a-z ]{5,40}\."),
        replace(base, grammar='start: "x = " sum\nsum: N | N " + " sum\nN: /[0-9]{1,3}/', frequency_penalty=1.0),
        replace(base, json_schema=json.dumps(RECORD), max_tokens=20),
        replace(base, json_schema=json.dumps(RECORD), stop=('", "age',)),
        replace(base, regex="[a-z ]{1,200}", min_tokens=9),
    )
    prompts = prompts_of(14, 90)
    requests = mixed(params, prompts + prompts[:7])
    return requests, run(plain(model, tokenizer), requests)


def test_the_rows_end_in_every_way(truth: tuple[Requests, Rows], tokenizer: Tokenizer) -> None:
    _, rows = truth
    for row, answer in rows.items():
        assert answer[1] is not FinishReason.ERROR
        match row % 7, answer[1]:
            case 0, FinishReason.STOP:
                jsonschema.validate(json.loads(text(tokenizer, answer)), RECORD)
                assert answer[0][-1] == 1, "the end of text is there"
            case 4, reason:
                assert reason is FinishReason.LENGTH and len(answer[0]) == 20
            case 5, _:
                assert text(tokenizer, answer).endswith('", "age') and answer[1] is FinishReason.STOP
            case 6, _:
                assert len(answer[0]) >= 9


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_going_faster_changes_a_row(
    model: Path, tokenizer: Tokenizer, truth: tuple[Requests, Rows], way: str
) -> None:
    requests, expected = truth
    engine = engine_of(model, tokenizer, **WAYS[way])
    assert run(engine, requests) == expected
    stats = engine.stats()
    assert (stats.forced > 100) == ("forced_tokens" not in WAYS[way])
    assert stats.drafted > 20 or "drafts" not in way


def test_rows_that_are_preempted_go_on_in_their_grammar(
    model: Path, tokenizer: Tokenizer, truth: tuple[Requests, Rows]
) -> None:
    """Every few steps, whoever began last starts again from its tokens, forced ones whose keys are not there among
    them."""
    requests, expected = truth
    engine = engine_of(model, tokenizer, speculation=Speculation("auto", 5, gate=False))
    table, admission = engine.table, engine.scheduler.admission
    engine.add(requests)
    found: Rows = {}
    for step in range(1000):
        done = engine.step()
        found |= {row: (done.tokens_of(i), FinishReason(done.finish_reasons[i])) for i, row in enumerate(done.rows)}
        decoding = np.flatnonzero(table.active & (table.computed >= table.prefill_end) & table.structured)
        if step % 3 == 2 and len(decoding):
            admission.preempt(int(decoding[table.epoch[decoding].argmax()]))
        if not engine.unfinished:
            break
    assert found == expected
    assert admission.preemptions > 5


@pytest.mark.parametrize("share_right", [1.0, 0.7, 0.0])
def test_a_draft_that_a_grammar_forbids_ends_the_draft(
    model: Path, tokenizer: Tokenizer, truth: tuple[Requests, Rows], share_right: float
) -> None:
    requests, expected = truth
    for forced in (False, True):
        engine = engine_of(model, tokenizer, speculation=Speculation("off"), forced_tokens=forced)
        engine.drafter = Adversary(engine, expected, share_right, 6)  # type: ignore[assignment]
        assert run(engine, requests) == expected
        assert engine.stats().accepted > 100 or share_right < 1


def test_forced_tokens_take_no_steps(model: Path, tokenizer: Tokenizer) -> None:
    requests = Requests.of([[5, 6, 7]], SamplingParams(regex="Python is a programming language[.!] The end[.]"))
    engine = engine_of(model, tokenizer, speculation=Speculation("off"))
    (answer,) = run(engine, requests).values()
    assert answer[1] is FinishReason.STOP and "programming language" in text(tokenizer, answer)
    assert answer == run(plain(model, tokenizer), requests)[0]
    stats = engine.stats()
    assert stats.forced == len(answer[0]) - stats.steps and stats.steps <= 4 < len(answer[0]) - 10


def test_any_of_several_ends_may_end_an_answer(model: Path) -> None:
    tokenizer = Tokenizer(Tokenizer.load(model)._backend, eos_ids=(1, 3))
    requests = Requests.of(prompts_of(40, 9), SamplingParams(temperature=3.0, regex="a"), seeds=range(40))
    found = run(engine_of(model, tokenizer), requests)
    assert {tuple(new[1:]) for new, _ in found.values()} == {(1,), (3,)}
    assert found == run(plain(model, tokenizer), requests)


def test_rows_that_cannot_go_on_get_an_error(model: Path, tokenizer: Tokenizer) -> None:
    """A grammar whose only token is banned, and one that grows beyond what is bearable; the others go on."""
    a = tokenizer.vocabulary["a"]
    params = (
        SamplingParams(max_tokens=9, regex="a", suppress_tokens=(a,)),
        SamplingParams(max_tokens=9, regex="a", min_tokens=3),
        SamplingParams(max_tokens=9, regex="(a{1000}){1000}"),
        SamplingParams(max_tokens=9, regex="ab"),
    )
    engine = engine_of(model, tokenizer)
    errors, reasons = {}, {}
    for done in engine.generate(mixed(params, [[5], [5], [5], [5]])):
        errors |= {row: error.code for row, error in done.errors.items()}
        reasons |= dict(zip(done.rows.tolist(), done.finish_reasons.tolist(), strict=True))
    assert errors == {0: "not_finite", 1: "not_finite", 2: "bad_grammar"} and reasons[3] == FinishReason.STOP


def test_grammars_in_the_interpreter(
    model: Path, tokenizer: Tokenizer, interpreted: Callable[..., Any], fixed_products: None
) -> None:
    params = (SamplingParams(max_tokens=12, regex="(ab|ba) end"), SamplingParams(max_tokens=3))
    requests = mixed(params, [[5, 6, 7], [8, 9]])
    found = run(interpreted(model, tokenizer, forced_tokens=False), requests)
    engine = interpreted(model, tokenizer)
    assert run(engine, requests) == found
    assert engine.stats().kernels["grammars"] == "triton" and engine.stats().forced
    assert text(tokenizer, found[0]).endswith(" end") and found[0][1] is FinishReason.STOP


def test_the_python_api(model: Path) -> None:
    llm = LLM(model, dtype="float32", device="cpu")
    (found,) = llm.generate(["Hello"], SamplingParams(json_schema={"enum": ["yes", "no"]}))
    assert found.text in ('"yes"', '"no"') and found.finish_reason == "stop"
    with pytest.raises(ValueError, match="json_schema has the keyword 'not' at #/not"):
        llm.generate(["Hello"], SamplingParams(json_schema={"not": {}}))
    with pytest.raises(ValueError, match="regex cannot be followed: unclosed group"):
        llm.generate(["Hello"], SamplingParams(regex="("))
    with pytest.raises(ValueError, match="json_schema is given, and regex too"):
        SamplingParams(json_schema="{}", regex="a")
    with pytest.raises(ValueError, match="ignore_eos is True, and regex says"):
        SamplingParams(regex="a", ignore_eos=True)
    with pytest.raises(ValueError, match="grammar is 3; it must be a text"):
        SamplingParams(grammar=3)  # type: ignore[arg-type]


def test_gguf_files_follow_grammars(make_model: Callable[..., Path], tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", make_model("llama", num_hidden_layers=1), "Q8_0")
    llm = LLM(tmp_path / "m.gguf", device="cpu")
    params = SamplingParams(max_tokens=90, temperature=1.0, json_schema=RECORD)
    for found in llm.generate(["Hello", "x"], params):
        assert found.finish_reason == "stop"
        jsonschema.validate(json.loads(found.text or ""), RECORD)
