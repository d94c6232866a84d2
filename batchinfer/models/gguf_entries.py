"""`Entries`: what a GGUF file says of its model's shape, in metadata entries and by the tensors that it has.

This module does not import torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from batchinfer.formats.gguf_parts import GGUFParts


@dataclass(frozen=True)
class Entries:
    """The entries of one architecture. Methods raise `ValueError` naming an entry or a tensor."""

    file: GGUFParts
    name: str  # of the architecture
    read: set[str] = field(default_factory=set)
    """The entries that were asked for. Another one that changes the result must have the value that does not."""

    def get(self, key: str, default: Any = None) -> Any:
        """Return an entry, unchecked."""
        self.read.add(key)
        return self.file.metadata.get(f"{self.name}.{key}", default)

    def has(self, key: str) -> bool:
        """Return whether there is an entry."""
        return f"{self.name}.{key}" in self.file.metadata

    def text_or_none(self, key: str) -> str | None:
        """Return an entry, a text, or None if it is missing."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def number(self, key: str, default: float | None = None) -> Any:
        """Return an entry, a number. Of an array, the one number that all its layers share, those with 0 aside."""
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and len(others := np.unique(value[value != 0])) == 1:
            value = others[0].item()
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a number")
        return value

    def number_or_none(self, key: str) -> Any:
        """Return an entry, a number, or None if it is missing or 0, which stands for none."""
        return self.number(key, 0) or None

    def flag(self, key: str, default: bool) -> bool:
        """Return an entry, true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Return an entry, a whole number of 1 or more."""
        value = self.number(key, default)
        if not isinstance(value, int) or value < 1:
            raise self._wrong(key, value, "a whole number of 1 or more")
        return value

    @property
    def all_layers(self) -> int:
        """Number of layers in the file."""
        count, tensors = self.size("block_count"), len(self.file.tensors)
        if count > tensors:
            raise self._wrong("block_count", count, f"no more than the {tensors} tensors of the file")
        return count

    @property
    def layers(self) -> int:
        """Number of layers, without the last ones, if they predict further tokens: those are left aside."""
        ahead = self.number("nextn_predict_layers", 0)
        if not 0 <= ahead < self.all_layers:
            raise self._wrong("nextn_predict_layers", ahead, f"a number below block_count, {self.all_layers}")
        return self.all_layers - int(ahead)

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.size("attention.key_length", self.size("embedding_length") // self.size("attention.head_count"))

    def by_layer(self, key: str, default: float | None = None) -> list[Any]:
        """Return an entry that has a number for each layer, or one for all."""
        value = self.get(key, default)
        if not isinstance(value, np.ndarray):
            return [self.number(key, default)] * self.layers
        if len(value) != self.all_layers:
            raise ValueError(
                f"{self.file.path}: {self.name}.{key} has {len(value)} numbers; block_count asks for {self.all_layers}"
            )
        numbers: list[Any] = value.tolist()
        return numbers[: self.layers]

    def windowed(self, every: int) -> list[bool]:
        """Return whether each layer has a window: all but every so-manieth one, where the file does not say."""
        key = "attention.sliding_window_pattern"
        value = self.get(key, every)
        if isinstance(value, np.ndarray):
            return list(map(bool, self.by_layer(key)))
        every = self.number(key, every)
        return [every == 0 or (i + 1) % every != 0 for i in range(self.layers)]

    def having(self, tensor: str) -> list[bool]:
        """Return whether each layer has a tensor of this name."""
        return [f"blk.{i}.{tensor}" in self.file.tensors for i in range(self.layers)]

    def biased(self, module: str) -> bool:
        """Return whether a module of layers has a bias."""
        return any(self.having(f"{module}.bias"))

    def inner(self, down: str) -> int:
        """Return the size of blocks from the tensor that maps it to the hidden size; 0 if no layer has it."""
        found = [self.file.tensors.get(f"blk.{i}.{down}.weight") for i in range(self.layers)]
        return next((tensor.shape[-1] for tensor in found if tensor is not None), 0)

    def rope_numbers(self, tensor: str) -> list[float]:
        """Return the numbers of a tensor by which rotary embedding divides."""
        if tensor not in self.file.tensors:
            raise ValueError(f"{self.file.path} has no tensor {tensor}")
        stored = self.file.tensors[tensor]
        if stored.type != "F32":
            raise ValueError(f"{self.file.path}: tensor {tensor} is {stored.type}; expected F32")
        numbers: list[float] = self.file.read(stored).view("<f4").tolist()
        return numbers

    def refuse_others(self, fixed: Mapping[str, Any]) -> None:
        """Raise `ValueError` for an entry that has another value than the one that is supported."""
        for key, supported in fixed.items():
            value = self.file.metadata.get(f"{self.name}.{key}", supported)
            if isinstance(value, np.ndarray) or value != supported:
                raise ValueError(
                    f"{self.file.path}: {self.name}.{key} is {shown(value)}; supported is {supported}: take the model "
                    "in the Hugging Face layout"
                )

    def _wrong(self, key: str, value: Any, expected: str) -> ValueError:
        if value is None:
            return ValueError(f"{self.file.path} has no {self.name}.{key}; expected {expected}: convert the model anew")
        return ValueError(f"{self.file.path}: {self.name}.{key} is {shown(value)}; expected {expected}")


def shown(value: Any) -> str:
    """Return a value from a file as one short line, for a message."""
    return ascii(str(value)[:50])
