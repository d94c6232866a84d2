"""`Activations`: rows of numbers that calibration keeps in a file, and reads in chunks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activations:
    """Rows stored one after the other in a file, which are read in chunks [T, columns]."""

    path: Path
    chunks: list[int]  # number of rows of each chunk
    columns: int
    dtype: torch.dtype

    @classmethod
    def write(cls, path: Path, chunks_TX: Iterable[Tensor], dtype: torch.dtype) -> "Activations":
        """Write all chunks to a file, which gets its name when it is complete."""
        unfinished, rows, columns = path.with_name(f"{path.name}.unfinished"), [], 0
        with unfinished.open("wb") as file:
            for chunk in chunks_TX:
                file.write(to_bytes(chunk))
                rows.append(len(chunk))
                columns = chunk.shape[1]
        unfinished.replace(path)
        return cls(path, rows, columns, dtype)

    def __iter__(self) -> Iterator[Tensor]:
        with self.path.open("rb") as file:
            for rows in self.chunks:
                chunk = torch.empty(rows, self.columns, dtype=self.dtype)
                if rows:
                    file.readinto(chunk.view(torch.uint8).numpy().data)
                yield chunk


def to_bytes(x: Tensor) -> bytes:
    """Return the numbers of a chunk as they are stored."""
    # torch cannot view an empty tensor as bytes.
    return x.contiguous().view(torch.uint8).numpy().tobytes() if len(x) else b""
