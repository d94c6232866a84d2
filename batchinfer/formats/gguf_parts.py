"""A model in one GGUF file, or in several named NAME-00001-of-0000N.gguf. This module does not import torch."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batchinfer.formats.gguf_file import GGUFFile, StoredTensor

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def part_names(name: str) -> list[str]:
    """Return the names of all parts of a model, in order, from that of any; of another file, its own name."""
    part = _PART.fullmatch(name)
    if part is None or not 1 <= int(part["number"]) <= int(part["count"]):
        return [name]
    count = int(part["count"])
    return [f"{part['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def part_files(path: Path) -> list[Path]:
    """Return the files of a model, in order, from any of them. Raises `ValueError` naming those that are missing."""
    files = [path.with_name(name) for name in part_names(path.name)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{path} is one of {len(files)} files of a model; {', '.join(missing[:3])}{more} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it: put all of them into one folder"
        )
    return files


class GGUFParts:
    """The metadata and tensors of a model whose files are given in order. `path` is the first file's.

    The first file has the metadata. Tensors of a type that is not supported are only in `unsupported`: their names by
    the type. Raises `ValueError` saying what is wrong, and where: also if files are not of one model.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        parts = [GGUFFile(file) for file in files]
        self.path = parts[0].path
        self.metadata: dict[str, Any] = parts[0].metadata
        _check(parts)
        self.tensors: dict[str, StoredTensor] = {}
        self.unsupported: dict[str, list[str]] = {}
        self._part_of: dict[str, GGUFFile] = {}
        for part in parts:
            if twice := self.tensors.keys() & part.tensors.keys():
                raise ValueError(f"{part.path}: tensor {min(twice)} is in an earlier part of the model, too")
            self.tensors |= part.tensors
            self._part_of |= dict.fromkeys(part.tensors, part)
            for kind, names in part.unsupported.items():
                self.unsupported.setdefault(kind, []).extend(names)

    def read(self, tensor: StoredTensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """Return a tensor's bytes, mapped from its file."""
        return self._part_of[tensor.name].read(tensor)


def _check(parts: list[GGUFFile]) -> None:
    """Raise `ValueError` unless the files say of themselves that they are these parts of a model."""
    count = parts[0].metadata.get("split.count")
    if len(parts) == 1:
        if isinstance(count, int) and count > 1:
            raise ValueError(
                f"{parts[0].path} is one of {count} files of a model by its split.count; name it "
                f"NAME-00001-of-{count:05}.gguf, and the others beside it likewise"
            )
        return
    tensors = sum(len(part.tensors) + sum(map(len, part.unsupported.values())) for part in parts)
    for number, part in enumerate(parts):
        for key, expected in ("split.count", len(parts)), ("split.no", number), ("split.tensors.count", tensors):
            found = part.metadata.get(key)
            if found != expected or isinstance(found, bool):
                raise ValueError(
                    f"{part.path}: {key} is {str(found)[:50]!a}; of the {len(parts)} files of that name, which "
                    f"hold {tensors} tensors, {expected} is expected: they are not the parts of one model"
                )
