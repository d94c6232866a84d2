"""Tokens that are named outside tokenizer.json, against transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from chat_models import CHATML, save

from batchinfer.text.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "yes"}]
TEXTS = ["plain", "a <|im_start|>user\nb<|im_end|> c", "<extra> x <extra>y", "</s> [PAD] end "]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer that knows <s> and </s> only, with a template that writes two more."""
    folder = save(tmp_path / "model", CHATML)
    file = json.loads((folder / "tokenizer.json").read_text())
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] in ("<s>", "</s>")]
    for text in ("<|im_start|>", "<|im_end|>"):
        file["model"]["vocab"].pop(text, None)
    file["model"]["vocab"] = {text: i for i, text in enumerate(file["model"]["vocab"])}
    (folder / "tokenizer.json").write_text(json.dumps(file))
    return folder


def size(folder: Path) -> int:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def change(folder: Path, name: str = "tokenizer_config.json", **fields: Any) -> None:
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | fields))


def flags(content: str, **fields: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, **fields}


def decoder(folder: Path) -> None:
    first = size(folder)
    tokens = [flags("<|im_start|>", special=True), flags("<|im_end|>", special=True), flags("<extra>", lstrip=True)]
    change(folder, added_tokens_decoder={str(first + i): token for i, token in enumerate(tokens)}, add_bos_token=False)


def decoder_of_names(folder: Path) -> None:
    first = size(folder)
    tokens = [flags("<|im_start|>", special=False), flags("<|im_end|>", special=False)]
    change(
        folder, added_tokens_decoder={str(first + i): token for i, token in enumerate(tokens)}, eos_token="<|im_end|>"
    )


def older_file(folder: Path) -> None:
    first = size(folder)
    change(folder, "added_tokens.json", **{"<|im_end|>": first + 1, "<|im_start|>": first, "<extra>": first + 2})
    change(folder, "special_tokens_map.json", eos_token={"content": "<|im_end|>", "lstrip": True})


def additional(folder: Path) -> None:
    change(folder, additional_special_tokens=["<|im_start|>", "<|im_end|>", "<extra>"], pad_token="[PAD]")


def extra_list(folder: Path) -> None:
    change(folder, extra_special_tokens=["<|im_start|>", "<|im_end|>"], additional_special_tokens=["<extra>"])


def extra_names(folder: Path) -> None:
    change(folder, extra_special_tokens={"start_token": "<|im_start|>", "end_token": "<|im_end|>"}, pad_token="[PAD]")


def older_extra(folder: Path) -> None:
    change(folder, "special_tokens_map.json", additional_special_tokens=["<|im_start|>", "<|im_end|>"])


def a_word(folder: Path) -> None:
    """A token of the vocabulary that is none of the added ones, in a sentence of others."""
    file = json.loads((folder / "tokenizer.json").read_text())
    word = next(text for text in file["model"]["vocab"] if len(text) == 3 and text.isalpha())
    change(folder, extra_special_tokens=[word, "<|im_start|>", "<|im_end|>"], unk_token=word)


WAYS = [decoder, decoder_of_names, older_file, additional, extra_list, extra_names, older_extra, a_word]


@pytest.mark.parametrize("name", WAYS)
def test_ids_are_those_of_transformers(folder: Path, name: Any) -> None:
    plain = Tokenizer.load(folder)
    name(folder)
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.vocabulary == theirs.get_vocab() and len(ours.vocabulary) > len(plain.vocabulary)
    ids, offsets = ours.encode_batch(TEXTS, allow_special_tokens=True)
    for i, text in enumerate(TEXTS):
        row = ids[offsets[i] : offsets[i + 1]]
        assert row.tolist() == theirs(text)["input_ids"], text
        [decoded] = ours.decode_batch(row, np.array([0, len(row)]))
        assert decoded == theirs.decode(row, skip_special_tokens=True), text
    chat, _, _ = ours.encode_chats([CHAT])
    assert chat.tolist() == theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert len(chat) < len(plain.encode_chats([CHAT])[0]) / 2
    assert ours.fingerprint != plain.fingerprint


def test_tokens_that_tokenizer_json_has_change_nothing(folder: Path) -> None:
    before = Tokenizer.load(folder)
    token = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_added_tokens_decoder()[1]
    change(folder, added_tokens_decoder={"1": flags(token.content, special=True)}, additional_special_tokens=["<s>"])
    after = Tokenizer.load(folder)
    assert after.fingerprint == before.fingerprint and after.vocabulary == before.vocabulary


@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json"])
def test_an_id_that_the_tokenizer_would_not_give_is_refused(folder: Path, name: str) -> None:
    """transformers gives the token the next free id, whatever the file says."""
    wrong = size(folder) + 3
    if name == "added_tokens.json":
        change(folder, name, **{"<|im_end|>": wrong})
    else:
        change(folder, added_tokens_decoder={str(wrong): flags("<|im_end|>")})
    assert transformers.AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>") == size(folder)
    said = rf"{name}: token '<\|im_end\|>' has id {wrong} there, but {size(folder)} with what tokenizer.json has"
    with pytest.raises(ValueError, match=said):
        Tokenizer.load(folder)


def test_tokens_beyond_the_models_vocabulary(folder: Path) -> None:
    """The model has no embedding for them: their text is ordinary text, unless the template is what writes it."""
    first = size(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": first + 2}))
    change(folder, extra_special_tokens=["<|im_start|>", "<|im_end|>"], pad_token="[PAD]")
    with pytest.raises(ValueError, match=rf"writes '<\|im_end\|>', a token beyond the model's vocab_size {first + 2}"):
        Tokenizer.load(folder)
    change(folder, extra_special_tokens=["<|im_start|>", "<|im_end|>", "[PAD]"])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.load(folder)
    assert ours.vocab_size == first + 2 and "[PAD]" not in ours.vocabulary


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"added_tokens_decoder": []}, r"added_tokens_decoder is '\[\]'; expected an object of tokens by id"),
        ({"added_tokens_decoder": {"x": flags("<x>")}}, "expected an object of tokens by id"),
        ({"added_tokens_decoder": {"9": "<x>", "8": 5}}, "added_tokens_decoder has '5'; expected a token's text"),
        ({"added_tokens_decoder": {"9": flags("<x>") | {"lstrip": 1}}}, "expected a token's text, or an object"),
        ({"extra_special_tokens": "<x>"}, "extra_special_tokens is '<x>'; expected a list or an object"),
        ({"additional_special_tokens": [5]}, "extra_special_tokens has '5'; expected a token's text"),
        ({"pad_token": {"text": "x"}}, "pad_token has .*; expected a token's text"),
    ],
)
def test_what_is_no_token_is_named(folder: Path, fields: dict[str, Any], said: str) -> None:
    change(folder, **fields)
    with pytest.raises(ValueError, match=rf"tokenizer_config.json: .*{said}"):
        Tokenizer.load(folder)


def test_ids_in_the_older_file_are_numbers(folder: Path) -> None:
    change(folder, "added_tokens.json", **{"<x>": "5"})
    with pytest.raises(ValueError, match=r"added_tokens\.json holds .*; expected an object of ids by a token's text"):
        Tokenizer.load(folder)
