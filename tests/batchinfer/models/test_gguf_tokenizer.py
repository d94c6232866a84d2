"""Tokenizers in GGUF files against llama.cpp's own ids, which record_llama_cpp_ids.py wrote to llama_cpp_ids.json."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest

from batchinfer.formats.gguf_parts import GGUFParts
from batchinfer.models.gguf_tokenizer import tokenizer_files
from batchinfer.models.gguf_words import WORDS
from batchinfer.text.tokenizer import Tokenizer

RECORDED = json.loads((Path(__file__).parent / "llama_cpp_ids.json").read_text())


def loaded(tmp_path: Path, model: str, tokens: dict[str, Any], **entries: Any) -> Tokenizer:
    """The tokenizer of a file that has no more than its entries."""
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens["tokens"])
    writer.add_token_types(tokens["types"])
    for name in "merges", "scores":
        if name in tokens:
            writer.add_array(f"tokenizer.ggml.{name}", tokens[name])
    for name, value in entries.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, value in tokenizer_files(GGUFParts([tmp_path / "t.gguf"])).items():
        (tmp_path / name).write_text(json.dumps(value))
    return Tokenizer.load(tmp_path)


def compare(made: Tokenizer, texts: list[str], expected: list[list[int]], decodes: bool = True) -> None:
    """Recognize tags that the vocabulary has, as llama.cpp does. No text has a control token."""
    ids, offsets = made.encode_batch(texts, allow_special_tokens=True)
    found = [ids[start:end].tolist() for start, end in pairwise(offsets)]
    different = {text: (got, want) for text, got, want in zip(texts, found, expected, strict=True) if got != want}
    assert not different
    assert not decodes or made.decode_batch(ids, offsets) == texts


@pytest.mark.parametrize("pre", RECORDED["byte_level_ids"])
def test_words_are_cut_as_llama_cpp_cuts_them(tmp_path: Path, pre: str) -> None:
    made = loaded(tmp_path, "gpt2", RECORDED["byte_level"], pre=pre, bos_token_id=0, eos_token_id=1)
    compare(made, RECORDED["texts"], RECORDED["byte_level_ids"][pre])


def test_every_way_of_cutting_words_is_recorded() -> None:
    cuts = {WORDS[pre].cuts for pre in RECORDED["byte_level_ids"]}
    assert {name for name, words in WORDS.items() if words.cuts not in cuts} == set()
    ids = [json.dumps(rows) for rows in RECORDED["byte_level_ids"].values()]
    assert len(set(ids)) >= len(ids) - 2  # but for two that differ in other things than the cuts


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_is_merged_as_llama_cpp_merges_it(tmp_path: Path, prefix: bool) -> None:
    made = loaded(tmp_path, "llama", RECORDED["pieces"], add_space_prefix=prefix, bos_token_id=1, eos_token_id=2)
    expected = RECORDED["pieces_ids"]["prefix" if prefix else "no prefix"]
    compare(made, RECORDED["pieces_texts"], expected, decodes=not prefix)  # a space goes behind found tokens, too


def test_characters_are_merged_as_llama_cpp_merges_them(tmp_path: Path) -> None:
    """Gemma 4's files have merges of characters, and mark the beginning of a text whatever they say."""
    made = loaded(tmp_path, "gemma4", RECORDED["gemma4"], bos_token_id=1, eos_token_id=2, add_bos_token=False)
    compare(made, RECORDED["pieces_texts"], RECORDED["gemma4_ids"])


def test_a_file_that_does_not_say_how_text_is_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer.ggml.pre, .* unknown; give the original tokenizer"):
        loaded(tmp_path, "gpt2", RECORDED["byte_level"])
    with pytest.raises(ValueError, match=r"pre is 'kimi-k2'; supported are gpt-2, .*: give the original tokenizer"):
        loaded(tmp_path, "gpt2", RECORDED["byte_level"], pre="kimi-k2")
    with pytest.raises(ValueError, match=r"model is 't5'; supported are gpt2, llama and gemma4: give the original"):
        loaded(tmp_path, "t5", RECORDED["byte_level"])


@pytest.mark.parametrize(("said", "marks"), [(None, True), (True, True), (False, False)])
def test_the_beginning_is_marked_as_the_file_or_else_llama_cpp_says(
    tmp_path: Path, said: bool | None, marks: bool
) -> None:
    entries = {} if said is None else {"add_bos_token": said}
    made = loaded(tmp_path, "gpt2", RECORDED["byte_level"], pre="llama-bpe", bos_token_id=0, **entries)
    assert (made.encode_batch(["x"])[0][0] == 0) == marks
