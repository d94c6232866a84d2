"""Converting the tokenizer in a GGUF file to the tokenizers library's files. This module does not import torch."""

import json
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from batchinfer.formats.gguf_parts import GGUFParts
from batchinfer.models.gguf_words import WORDS

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

# Tokens at which llama.cpp ends an answer by their text (llama_vocab::impl::load in src/llama-vocab.cpp of
# ggml-org/llama.cpp), whatever the file says of them; without the tokens of code infilling, which end no answer.
_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend▁of▁sentence\uff5c>",
    "[e~[",
}  # fmt: skip
_REMEDY = "give the original tokenizer with --tokenizer"


def tokenizer_files(file: GGUFParts) -> dict[str, Any]:
    """Return tokenizer.json and tokenizer_config.json as objects.

    Raises `ValueError` naming what is damaged or not supported.
    """
    try:
        return _files(file)
    except ValueError:
        raise
    except Exception as error:  # the library raises plain `Exception`
        raise ValueError(f"{file.path}: its tokenizer is damaged ({str(error)[:100]!a}); {_REMEDY}") from error


def end_of_text_ids(file: GGUFParts) -> list[int]:
    """Return the ids of the tokens that end a text, a turn or a message: those the file names, and those of `_ENDS`."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    ids = {file.metadata[key] for key in keys if isinstance(file.metadata.get(key), int)}
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    return sorted(ids.union(_ends(tokens) if isinstance(tokens, list) else ()))


def _ends(tokens: list[str]) -> list[int]:
    found = {text: i for i, text in enumerate(tokens) if text in _ENDS}
    if {"<|return|>", "<|call|>"} <= found.keys() or {"<|calls|>", "<|flush|>"} <= found.keys():
        found.pop("<|end|>", None)  # it ends a part of an answer there
    if "<|tool_response>" in found:
        found.pop("</s>", None)  # a word like any other there
    return list(found.values())


def _files(file: GGUFParts) -> dict[str, Any]:
    tokens = _column(file, "tokens", list)
    kinds = file.metadata.get("tokenizer.ggml.token_type")
    kinds = [_NORMAL] * len(tokens) if kinds is None else list(map(int, kinds))
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(f"{file.path}: tokenizer.ggml.tokens and token_type do not fit together, or tokens repeat")
    for i in _ends(tokens):
        kinds[i] = _CONTROL
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        made = _byte_level(file, tokens)
    elif kind == "llama":
        made = _sentencepiece(file, tokens, kinds)
    elif kind == "gemma4":
        made = _characters(tokens, kinds, _merges(file), prefix=False)
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
    else:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.model is {str(kind)[:50]!a}; supported are gpt2, llama and gemma4: {_REMEDY}"
        )
    made.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == _CONTROL]
    )
    made.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == _USER_DEFINED])
    config: dict[str, Any] = {}
    for name in ("bos", "eos", "unknown", "padding"):
        index = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(index, int) and index < len(tokens):
            config[{"unknown": "unk", "padding": "pad"}.get(name, name) + "_token"] = tokens[index]
    if _adds_bos(file) and "bos_token" in config:
        bos = config["bos_token"]
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    if "tokenizer.chat_template" in file.metadata:
        config["chat_template"] = file.metadata["tokenizer.chat_template"]
    return {"tokenizer.json": json.loads(made.to_str()), "tokenizer_config.json": config}


def _adds_bos(file: GGUFParts) -> bool:
    """Return whether the beginning of a text is marked, by the file's entry or as llama.cpp does without one."""
    kind = file.metadata.get("tokenizer.ggml.model")
    words = WORDS.get(str(file.metadata.get("tokenizer.ggml.pre")))
    default = kind == "llama" or (words is not None and words.adds_bos)
    return kind == "gemma4" or bool(file.metadata.get("tokenizer.ggml.add_bos_token", default))


def _byte_level(file: GGUFParts, tokens: list[str]) -> tokenizers.Tokenizer:
    name = file.metadata.get("tokenizer.ggml.pre")
    if name is None:  # llama.cpp warns, and cuts in the default way, in which no model was trained
        raise ValueError(f"{file.path} has no tokenizer.ggml.pre, so how its text is cut is unknown; {_REMEDY}")
    words = WORDS.get(str(name))
    if words is None:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.pre is {str(name)[:50]!a}; supported are {', '.join(WORDS)}: {_REMEDY}"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, _merges(file), ignore_merges=words.whole))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in words.cuts]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if words.composes:
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(file: GGUFParts, tokens: list[str], kinds: list[int]) -> tokenizers.Tokenizer:
    """Make a SentencePiece BPE tokenizer.

    A GGUF file has no merges, so they are derived: one for every pair of tokens that together are a token, ordered by
    that token's score.
    """
    scores = [float(score) for score in _column(file, "scores", object)]
    if len(scores) != len(tokens):
        raise ValueError(f"{file.path}: tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    plain = [i for i, kind in enumerate(kinds) if kind in (_NORMAL, _USER_DEFINED)]
    ranked = []
    for i in plain:
        token = tokens[i]
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        inside = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
        inside.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        ranked += [(-scores[i], -len(left), -len(right), left, right) for left, right in inside]
    ranked.sort(key=lambda entry: entry[:3])
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    return _characters(tokens, kinds, [(left, right) for *_, left, right in ranked], prefix)


def _characters(
    tokens: list[str], kinds: list[int], merges: list[tuple[str, str]], prefix: bool
) -> tokenizers.Tokenizer:
    """Make a tokenizer that merges characters, with ▁ for a space and bytes for characters that are no tokens.

    With `prefix`, a space goes before a text.
    """
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in kinds)
    )
    steps = [normalizers.Prepend("▁")] if prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    return made


def _merges(file: GGUFParts) -> list[tuple[str, str]]:
    pairs = [merge.partition(" ") for merge in _column(file, "merges", list)]
    return [(left, right) for left, _, right in pairs]


def _column(file: GGUFParts, name: str, kind: type) -> Any:
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    if value is None or not isinstance(value, kind):
        raise ValueError(f"{file.path} has no tokenizer.ggml.{name}; {_REMEDY}")
    return value
