"""The files beside tokenizer.json: special tokens by name, ids that end a text, and the chat template."""

from pathlib import Path
from typing import Any

from batchinfer.host.files import read_object, refuse_pointer


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file. Raises `ValueError` if it is a git-lfs pointer."""
    refuse_pointer(path)
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file, or {} if there is no such file."""
    return read_object(path) if path.is_file() else {}


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json. Older checkpoints have special tokens in a file of their own, which comes first."""
    config = read_json(folder / "tokenizer_config.json")
    return config if "added_tokens_decoder" in config else config | read_json(folder / "special_tokens_map.json")


def named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return the text of bos_token, eos_token and so on."""
    named = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            named[key] = text
    return named


def end_of_text_ids(model_dir: Path) -> tuple[int, ...] | None:
    """Return the ids that end a text, or None if the model's configs have none."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(model_dir / name).get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(i) is int and 0 <= i < 1 << 31 for i in ids):
                raise ValueError(
                    f"{model_dir / name}: eos_token_id is {str(value)[:50]!a}; expected one id or a list of ids"
                )
            return tuple(ids)
    return None


def template_source(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the chat template's source, or None.

    A file has precedence over the entry in tokenizer_config.json. Of several named templates, the one called 'default'
    is taken.
    """
    more = {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    file = more.get("default", folder / "chat_template.jinja")
    if file.is_file():
        try:
            return read_bytes(file).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: {error}") from None
    if more:
        return None
    source = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(source, list):
        named = [e.get("template") for e in source if isinstance(e, dict) and e.get("name") == "default"]
        source = named[-1] if named else None
    if source is not None and not isinstance(source, str):
        raise ValueError(f"{folder}: chat_template is a {type(source).__name__}; expected a text or named templates")
    return source
