"""Texts among sampling params, with the tokenizers library and transformers as oracles."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from chat_models import chat_model

from batchinfer import LLM, SamplingParams

TEXTS = ["Hello", "the user and the assistant", "a model of the system"]
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


def generated(folder: Path, theirs: Any, **settings: Any) -> list[list[int]]:
    """What transformers generates, with the settings of the folder's generation_config.json and these."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    encoded = [theirs(text, return_tensors="pt") for text in TEXTS]
    return [model.generate(**e, max_new_tokens=12, **settings)[0, e.input_ids.shape[1] :].tolist() for e in encoded]


def only(token: int) -> SamplingParams:
    """Params with which a model has no other token to give."""
    return replace(GREEDY, suppress_tokens=tuple(i for i in range(520) if i != token))


def test_a_stop_text_that_is_a_control_token_ends_the_answer_there(llm: LLM, theirs: Any) -> None:
    token = theirs.convert_tokens_to_ids("<|im_end|>")
    without, within = (
        llm.generate(["Hello"], replace(only(token), stop=stop))[0] for stop in ((), ("<|im_end|>", "x"))
    )
    assert (without.finish_reason, len(without.token_ids)) == ("length", 12)
    assert (within.finish_reason, within.token_ids, within.text) == ("stop", [token], "")
    assert f"stop '<|im_end|>' is a control token: answers end at its id {token}" in llm.stats().notes


def test_a_stop_text_that_can_never_match_is_told(llm: LLM, theirs: Any) -> None:
    llm.generate(["Hello"], replace(GREEDY, stop=("<|im_end|>\n",)))
    token = theirs.convert_tokens_to_ids("<|im_end|>")
    (note,) = (note for note in llm.stats().notes if "never matches" in note)
    assert "'<|im_end|>'" in note and note.endswith(f"--stop-token-ids {token}")


def test_a_tag_that_is_printed_stays_a_text(llm: LLM, theirs: Any) -> None:
    token = theirs.convert_tokens_to_ids("</think>")
    (found,) = llm.generate(["Hello"], replace(only(token), stop=("k></think>",)))
    assert (found.finish_reason, found.text) == ("stop", "</thin")
    assert not any("</think>" in note for note in llm.stats().notes)


def test_a_stop_token_is_not_printed(llm: LLM, theirs: Any) -> None:
    (free,) = llm.generate(["Hello"], GREEDY)
    end = next(i for i in range(3, 12) if free.token_ids[i] not in free.token_ids[:i])
    (found,) = llm.generate(["Hello"], replace(GREEDY, stop_token_ids=(free.token_ids[end],)))
    assert found.token_ids == free.token_ids[: end + 1] and found.finish_reason == "stop"
    assert found.text == theirs.decode(free.token_ids[:end], skip_special_tokens=True)


def test_bad_words_are_kept_out_at_the_start_and_inside(folder: Path, llm: LLM, theirs: Any) -> None:
    free = llm.generate(TEXTS, GREEDY)
    words = [theirs.decode(completion.token_ids[2:4]) for completion in free]
    ids = [theirs(prefix + word.lstrip(), add_special_tokens=False).input_ids for word in words for prefix in ("", " ")]
    found = llm.generate(TEXTS, replace(GREEDY, bad_words=words))
    assert [c.token_ids for c in found] == generated(folder, theirs, bad_words_ids=ids)
    assert [c.token_ids for c in found] != [c.token_ids for c in free]


def test_a_checkpoints_own_settings_give_the_answers_of_transformers(folder: Path, theirs: Any, tmp_path: Path) -> None:
    copy = tmp_path / "own"
    shutil.copytree(folder, copy)
    file = copy / "generation_config.json"
    own = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": [5, 600], "min_new_tokens": 5}
    file.write_text(json.dumps(json.loads(file.read_text()) | own | {"temperature": 0.6}))
    found = {choice: LLM(copy, device="cpu", generation_config=choice) for choice in ("auto", "none")}
    answers = {choice: [c.token_ids for c in llm.generate(TEXTS, GREEDY)] for choice, llm in found.items()}
    assert answers["auto"] == generated(copy, theirs) != answers["none"] == generated(folder, theirs)
    assert "repetition_penalty 1.3" in found["auto"].stats().notes[-2]
    assert "temperature 0.6 not applied" in found["auto"].stats().notes[-1]
    assert "not applied: --generation-config is none" in found["none"].stats().notes[-1]


def test_an_id_that_the_model_lacks_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="suppress_tokens is 520; it must be at most 519"):
        llm.generate(["Hello"], SamplingParams(suppress_tokens=(520,)))
