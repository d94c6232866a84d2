"""Tokens that a checkpoint names outside tokenizer.json. They are added to its tokenizer as transformers adds them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from batchinfer.text.tokenizer_files import read_json

# The order in which transformers adds special tokens by name; others follow.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FIELDS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True)
class NamedToken:
    """A token that is named outside tokenizer.json, the file, and its id if the file has that."""

    token: AddedToken
    file: Path
    stored_id: int | None = None


def tokens_outside(folder: Path, config: dict[str, Any]) -> list[NamedToken]:
    """Return the tokens that the files beside tokenizer.json name, in the order in which they get their ids.

    `config` is that of `tokenizer_config`. Raises `ValueError` for an entry that is no token.
    """
    file = folder / "tokenizer_config.json"
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    by_name = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str | dict)}
    by_name |= extra if isinstance(extra, dict) else {}
    named = {key: _token(file, key, by_name[key], special=True) for key in sorted(by_name, key=_rank)}
    extras = [_token(file, "extra_special_tokens", value, special=True) for value in _list(file, extra)]
    if "added_tokens_decoder" in config:
        stored = _decoder(file, config["added_tokens_decoder"])
    else:
        standard = {token.content for key, token in named.items() if key in _NAMES}
        stored = _older(folder / "added_tokens.json", standard | {token.content for token in extras})
    names = {token.content for token in named.values()}
    for entry in stored:
        entry.token.special = entry.token.special or entry.token.content in names
    return stored + [NamedToken(token, file) for token in (*named.values(), *extras)]


def add_tokens(backend: tokenizers.Tokenizer, tokens: list[NamedToken], size: int | None) -> list[str]:
    """Add tokens to the tokenizer, and return those that were left out because their id would not be below `size`.

    A model has no embedding for a token beyond its vocabulary. Raises `ValueError` if a token's id is another one than
    its file says.
    """
    known = backend.get_added_tokens_decoder()
    ids = {token.content: token_id for token_id, token in known.items()}
    words = backend.get_vocab_size(with_added_tokens=False)
    following = max(words, *(token_id + 1 for token_id in known), 0)
    kept, left_out = [], []
    for entry in tokens:
        content = entry.token.content
        is_new = content not in ids
        if is_new:
            token_id = backend.token_to_id(content)
            ids[content] = following if token_id is None else token_id
            following += token_id is None
        if entry.stored_id not in (None, ids[content]):
            raise ValueError(
                f"{entry.file}: token {content[:50]!a} has id {entry.stored_id} there, but {ids[content]} with what "
                "tokenizer.json has: the two files do not belong together"
            )
        if size is not None and ids[content] >= size:
            left_out.append(content)
        elif is_new or entry.stored_id is not None:
            kept.append(entry.token)
    backend.add_tokens(kept)
    return left_out


def _rank(key: str) -> int:
    return _NAMES.index(key) if key in _NAMES else len(_NAMES)


def _list(file: Path, value: Any) -> list[Any]:
    if not isinstance(value, list | dict):
        raise ValueError(f"{file}: extra_special_tokens is {str(value)[:50]!a}; expected a list or an object")
    return value if isinstance(value, list) else []


def _token(file: Path, key: str, value: Any, special: bool = False) -> AddedToken:
    """Make a token of its text, or of an object with its `content` and how it is matched."""
    fields = value if isinstance(value, dict) else {"content": value}
    content, flags = fields.get("content"), {name: fields[name] for name in _FIELDS if name in fields}
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(f"{file}: {key} has {str(value)[:50]!a}; expected a token's text, or an object with content")
    return AddedToken(content, **flags | ({"special": True} if special else {}))


def _decoder(file: Path, value: Any) -> list[NamedToken]:
    """Read added_tokens_decoder, an object of tokens by id."""
    if not isinstance(value, dict) or not all(key.isdecimal() for key in value):
        raise ValueError(f"{file}: added_tokens_decoder is {str(value)[:50]!a}; expected an object of tokens by id")
    tokens = {int(key): _token(file, "added_tokens_decoder", token) for key, token in value.items()}
    return [NamedToken(tokens[i], file, i) for i in sorted(tokens)]


def _older(file: Path, special: set[str]) -> list[NamedToken]:
    """Read added_tokens.json, an object of ids by text."""
    ids = read_json(file)
    if not all(type(i) is int for i in ids.values()):
        raise ValueError(f"{file} holds {str(ids)[:50]!a}; expected an object of ids by a token's text")
    return [
        NamedToken(AddedToken(text, normalized=text not in special, special=text in special), file, ids[text])
        for text in sorted(ids, key=ids.__getitem__)
    ]
