"""Making a checkpoint folder in the Hugging Face layout from a GGUF model: config, tokenizer, and links to its files.

All code that reads checkpoints can then read the folder. This module does not import torch, because the parent process
of a job imports it.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from batchinfer.formats.gguf_file import TYPES
from batchinfer.formats.gguf_parts import GGUFParts, part_files, part_names
from batchinfer.models.gguf_config import config_of, entries_of
from batchinfer.models.gguf_tokenizer import end_of_text_ids, tokenizer_files

_WEIGHTS = "model.gguf"


def weight_files(folder: Path) -> list[Path]:
    """Return the GGUF files in a checkpoint's folder, in the order of their parts: none if it has other weights."""
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    return sorted(folder.glob("model-?????-of-?????.gguf"))


def unpack_gguf(path: Path, folder: Path, tokenizer: bool = True) -> None:
    """Write config.json, generation_config.json, the tokenizer's files and links to the GGUF files to `folder`.

    `path` is the model's file, or any of its files. Without `tokenizer`, its tokenizer is not read. Raises `ValueError`
    for a file that is damaged, or naming all that is not supported or missing.
    """
    paths = part_files(path)
    file = GGUFParts(paths)
    entries = entries_of(file)
    refusals, files = [], {}
    try:
        files = tokenizer_files(file) if tokenizer else {}
    except ValueError as error:
        refusals.append(str(error))
    if file.unsupported:
        refusals.append(_types(file))
    if refusals:
        raise ValueError("; and ".join(refusals))
    files["config.json"] = config_of(entries)
    eos_ids = end_of_text_ids(file)
    files["generation_config.json"] = {"eos_token_id": eos_ids} if eos_ids else {}
    links = [_WEIGHTS] if len(paths) == 1 else part_names(f"model-00001-of-{len(paths):05}.gguf")
    folder.mkdir(parents=True, exist_ok=True)
    # Each file is moved there by a rename, because another job may be reading the same folder.
    with TemporaryDirectory(dir=folder) as scratch:
        for name, value in files.items():
            (Path(scratch) / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
        for name, target in zip(links, paths, strict=True):
            (Path(scratch) / name).symlink_to(target.resolve())
        for name in (*files, *links):
            (Path(scratch) / name).replace(folder / name)


def _types(file: GGUFParts) -> str:
    """Say which tensors are of types that are not supported."""
    found = [
        f"{len(names)} tensor{'s' if len(names) > 1 else ''} of type {kind} ({names[0]}{', ...' if names[1:] else ''})"
        for kind, names in sorted(file.unsupported.items())
    ]
    supported = ", ".join(name for name, _, _ in TYPES.values())
    return f"{file.path} has {', '.join(found)}; supported are {supported}: take another quantization of the model"
