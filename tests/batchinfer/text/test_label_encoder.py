"""Labels behind prompts have the ids that the tokenizers library gives prompt and label together."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from chat_models import CHATML, save
from hypothesis import example, given, settings
from hypothesis import strategies as st
from repository import TARGET

from batchinfer.text.label_encoder import LabelEncoder
from batchinfer.text.tokenizer import Tokenizer

PROMPTS = [
    "Review: Small, quick and quiet.\nLabel:",
    "<|im_start|>user\nIs it good?<|im_end|>\n<|im_start|>assistant\n",
    "the user and the assistant of the system model " * 8 + "said",
    "日本語",
    "日本語" * 6,
    "",
]
LABELS = ["positive", " negative", "日本", "system user", "42", " the"]


@pytest.fixture(scope="module", params=["byte level", "sentence piece", "demo"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "demo":
        return TARGET
    made = save(tmp_path_factory.mktemp("tokenizer"), CHATML, sentence_piece=request.param == "sentence piece")
    (made / "config.json").write_text('{"vocab_size": 600}')
    return made


def joined(folder: Path, prompt: str, label: str) -> tuple[list[int], list[int]]:
    """(the prompt's ids, those of prompt and label) by the library alone."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    first, both = (backend.encode(text, add_special_tokens=False).ids for text in (prompt, prompt + label))
    return first, both


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_label_has_the_ids_that_follow_the_prompts(folder: Path, prompt: str) -> None:
    encoder = LabelEncoder(Tokenizer.load(folder))
    before = joined(folder, prompt, "")[0]
    found = encoder.encode(np.array(before, np.int32), LABELS)
    compared = 0
    for label, ids in zip(LABELS, found, strict=True):
        both = joined(folder, prompt, label)[1]
        if both[: len(before)] == before:
            assert list(ids) == both[len(before) :]
            compared += 1
        else:  # a token of both together spans the border
            assert Tokenizer.load(folder).text_of(ids).strip() == label.strip()
    assert compared >= 2 or not prompt


WORDS = st.lists(st.sampled_from(["the", "system", " user", "model", "\n", ":", "日本語", " ", "a", "1"]), min_size=1)


@settings(max_examples=60, deadline=None)
@given(words=WORDS, label=st.sampled_from(LABELS))
@example(["日本語"] * 2, " negative").via("the last 16 tokens begin within a character")
def test_the_end_of_the_prompt_is_enough(words: list[str], label: str) -> None:
    encoder, prompt = LabelEncoder(Tokenizer.load(TARGET)), "".join(words)
    before, both = joined(TARGET, prompt, label)
    ids = encoder.encode(np.array(before, np.int32), [label])[0]
    assert list(ids) == both[len(before) :] or both[: len(before)] != before


def test_labels_are_encoded_once_behind_the_same_end() -> None:
    tokenizer = Tokenizer.load(TARGET)
    encoder, calls = LabelEncoder(tokenizer), 0
    encode = tokenizer.encode_plain

    def counted(texts: list[str]) -> list[list[int]]:
        nonlocal calls
        calls += 1
        return encode(texts)

    tokenizer.encode_plain = counted  # type: ignore[method-assign]
    end = encode(["\nThe answer, in one word of these two, is this one:"])[0]
    for text in ("one", "two", "three"):
        encoder.encode(np.array([*encode([text])[0], *end], np.int32), LABELS)
    assert calls == 1
