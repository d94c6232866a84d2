"""Reading the container of GGUF files (versions 2 and 3, little-endian): metadata, and where each tensor's bytes are.

A file holds, in this order: the magic number, the version, the number of tensors and the number of metadata entries;
the entries; the tensors' descriptions; and, from the next multiple of `general.alignment` on, the tensors' data. Every
count, length and offset is checked against the file's size before memory is allocated for it. This module does not
import torch.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batchinfer.host.files import refuse_pointer

_NUMBERS = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9

# By the type's number in the file: name, elements per block, bytes per block.
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136), 39: ("MXFP4", 32, 17),
}  # fmt: skip
_OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's type, and where its bytes are in the file; the last dimension of `shape` is the contiguous one."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GGUFFile:
    """A GGUF file's `metadata` by key and `tensors` by name. Raises `ValueError` saying what is wrong, and where.

    Tensors of a type that is not supported are only in `unsupported`: their names by the type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_pointer(path)
        self.size = path.stat().st_size
        if self.size < 24:
            raise ValueError(f"{path} is not a GGUF file: it has {self.size} bytes")
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        magic, version, tensors, entries = struct.unpack("<4sIQQ", self._take(24))
        if magic != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it begins with {magic!r}")
        if version not in (2, 3):
            raise ValueError(f"{path}: GGUF version {version}; supported are 2 and 3 (little-endian)")
        self._check_count(entries, 13, "metadata entries")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string()
            self.metadata[key] = self._value(self._number("<u4"), key)
        self._check_count(tensors, 24, "tensors")
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20:
            raise ValueError(f"{path}: general.alignment is {str(alignment)[:50]!a}")
        described = [self._description() for _ in range(tensors)]
        base = -(-self._at // alignment) * alignment
        self.tensors: dict[str, StoredTensor] = {}
        self.unsupported: dict[str, list[str]] = {}
        for name, kind, shape, offset in described:
            if name in self.tensors:
                raise ValueError(f"{path}: tensor {_short(name)} is there twice")
            if kind in TYPES:
                self.tensors[name] = self._located(name, kind, shape, base, offset, alignment)
            else:
                self.unsupported.setdefault(_OTHERS.get(kind, f"number {kind}"), []).append(_short(name))

    def read(self, tensor: StoredTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return a tensor's bytes, mapped from the file."""
        return np.frombuffer(self._bytes, np.uint8, tensor.nbytes, tensor.start)

    def _located(
        self, name: str, kind: int, shape: tuple[int, ...], base: int, offset: int, alignment: int
    ) -> StoredTensor:
        label, elements, nbytes = TYPES[kind]
        if shape[-1] % elements:
            raise ValueError(
                f"{self.path}: tensor {_short(name)} has rows of {shape[-1]} numbers, which is not a multiple of "
                f"{label}'s {elements}"
            )
        total = math.prod(shape) // elements * nbytes
        start = base + offset
        if offset % alignment or start + total > self.size:
            raise ValueError(
                f"{self.path}: tensor {_short(name)} ({total} bytes at {start}) lies beyond the file's {self.size} "
                "bytes or off its alignment: the file is truncated or damaged"
            )
        return StoredTensor(name, label, shape, start, total)

    def _description(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        dimensions = self._number("<u4")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{self.path}: tensor {_short(name)} has {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions))
        if not 0 < math.prod(shape) <= 8 * self.size:  # no type has more elements in a byte
            raise ValueError(
                f"{self.path}: tensor {_short(name)} of {list(shape)} cannot be in a file of {self.size} bytes"
            )
        return name, self._number("<u4"), shape[::-1], self._number("<u8")

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(key)
        value = self._number(self._format(kind, key))
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str) -> Any:
        kind, count = self._number("<u4"), self._number("<u8")
        if kind == _STRING:
            self._check_count(count, 8, f"strings in {_short(key)}")
            return [self._string() for _ in range(count)]
        form = np.dtype(self._format(kind, key))
        self._check_count(count, form.itemsize, f"numbers in {_short(key)}")
        return np.frombuffer(self._take(count * form.itemsize), form)

    def _format(self, kind: int, key: str) -> str:
        if kind not in _NUMBERS:
            raise ValueError(f"{self.path}: {_short(key)} has values of type {kind}, which is not known")
        return _NUMBERS[kind]

    def _number(self, form: str) -> Any:
        dtype = np.dtype(form)
        return np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()

    def _string(self) -> str:
        length = self._number("<u8")
        self._check_count(length, 1, "bytes of a text")
        return self._take(length).decode("utf-8", "replace")

    def _take(self, count: int) -> bytes:
        if count > self.size - self._at:
            raise ValueError(f"{self.path} ends at byte {self.size}, in the middle of its header: it is truncated")
        self._at += count
        return self._bytes[self._at - count : self._at]

    def _check_count(self, count: int, least_bytes: int, what: str) -> None:
        if count * least_bytes > self.size - self._at:
            raise ValueError(
                f"{self.path} claims {count} {what} at byte {self._at}, more than its {self.size} bytes can hold: "
                "it is truncated or damaged"
            )


def _short(name: str) -> str:
    """Return a name for a message; of a damaged one, only its beginning with special characters escaped."""
    return name if len(name) <= 100 and name.isprintable() else ascii(name[:50])
