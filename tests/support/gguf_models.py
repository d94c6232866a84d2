"""Checkpoints of transformers as GGUF files, written by the format's own library."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from gguf import GGMLQuantizationType as Q
from gguf_facts import architecture_of, config_of, divisors_of, entries_of
from gguf_layout import laid_out, with_joined
from gguf_texts import TEXTS
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers


def train(cut: Any, normalizer: Any = None) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=False))
    made.pre_tokenizer, made.decoder = cut, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=318, initial_alphabet=alphabet, special_tokens=["<|bos|>", "<|end|>"])
    made.train_from_iterator(TEXTS * 3, trainer)
    return made


def add_byte_level(writer: gguf.GGUFWriter, made: tokenizers.Tokenizer, pre: str | None) -> None:
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def byte_level(pre: str) -> tokenizers.Tokenizer:
    if pre == "gpt-2":
        return train(pre_tokenizers.ByteLevel(add_prefix_space=False))
    words = Regex(LLAMA_WORDS.replace("{1,3}", "") if pre == "qwen2" else LLAMA_WORDS)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), whole])
    return train(cut, normalizers.NFC() if pre == "qwen2" else None)


def add_entry(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)


def write_model(
    path: Path,
    model: Path,
    kind: str,
    pre: str = "gpt-2",
    tensors_a_file: int = 0,
    expanded: bool = False,
    joined: bool = False,
    changes: dict[str, Any] | None = None,
    architecture: str | None = None,
    **more: np.ndarray,
) -> None:
    """A checkpoint of transformers as the format's own converter lays it out; in one file unless told otherwise.

    Matrices are quantized, but not those that decide which experts compute, and those of convolutions; of a kind
    "Q8_0, MXFP4" the second one is for experts. With `expanded`, the numbers that they stand for are stored instead;
    with `joined`, matrices with the same input as one. `changes` are entries that differ, without those that are None,
    and `more` are further tensors.
    """
    usual, _, of_experts = kind.partition(", ")
    config = config_of(model)
    architecture = architecture or architecture_of(config)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_a_file)
    for key, value in {**entries_of(config), **(changes or {})}.items():
        if value is not None:
            add_entry(writer, f"{architecture}.{key}", value)
    add_byte_level(writer, byte_level(pre), pre)
    tensors = dict(laid_out(model, config))
    for name, values in (with_joined(tensors) if joined else tensors).items():
        own = Q[of_experts if of_experts and name.endswith("_exps.weight") else usual]
        if own == Q.F32 or values.ndim == 1 or name.endswith(".bias") or re.search("conv|gate_inp", name):
            writer.add_tensor(name, values)
            continue
        quantized = gguf.quants.quantize(values, own)
        if expanded:
            writer.add_tensor(name, gguf.quants.dequantize(quantized, own))
        else:
            writer.add_tensor(name, quantized, raw_dtype=own)
    for name, value in {**divisors_of(config), **more}.items():
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
