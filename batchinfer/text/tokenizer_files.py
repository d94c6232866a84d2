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
        config = read_json(model_dir / name)
        inside = config.get("text_config")  # of a checkpoint that wraps a language model
        value = config.get("eos_token_id", inside.get("eos_token_id") if isinstance(inside, dict) else None)
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(i) is int and 0 <= i < 1 << 31 for i in ids):
                raise ValueError(
                    f"{model_dir / name}: eos_token_id is {str(value)[:50]!a}; expected one id or a list of ids"
                )
            return tuple(ids)
    return None


def template_sources(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the sources of the chat templates by name: 'default', and 'tool_use' for conversations with tools.

    Files have precedence over the entries in tokenizer_config.json.
    """
    files = {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    if (usual := folder / "chat_template.jinja").is_file():
        files.setdefault("default", usual)
    if files:
        return {name: read_template(files[name]) for name in ("default", "tool_use") if name in files}
    entry = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    named = entry if isinstance(entry, list) else [{"name": "default", "template": entry}] if entry else []
    sources = {}
    for each in named:
        if isinstance(each, dict) and each.get("name") in ("default", "tool_use"):
            source = each.get("template")
            if not isinstance(source, str):
                raise ValueError(
                    f"{folder}: chat_template is a {type(source).__name__}; expected a text or named templates"
                )
            sources[each["name"]] = source
    return sources


def read_template(file: Path) -> str:
    """Return the source of the chat template in a file. Raises `ValueError` if it is not UTF-8."""
    try:
        return read_bytes(file).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None
