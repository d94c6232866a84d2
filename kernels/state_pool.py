"""`StatePool`: the states of one layer that is no attention; and which of them the tokens of a step read and write.

A state is what such a layer keeps of all earlier positions of a sequence. It has the same number in all layers. State 0
is that before the first token: it is zero, and nothing is written to it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from batchinfer.kernels.grain import TILE
from batchinfer.kernels.kv_cache import zeros


@dataclass(frozen=True)
class StateShape:
    """The sizes of one layer's state: the last inputs of a convolution, and a matrix for each head, if it has any."""

    inputs: int  # number of positions
    channels: int
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0

    def nbytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of a state whose inputs are of this type; matrices are float32."""
        return self.inputs * self.channels * dtype.itemsize + self.heads * self.key_dim * self.value_dim * 4


class StatePool:
    """The states of one layer: `inputs` [states, inputs, channels] and `matrices` [states, heads, key, value].

    Matrices are float32, because they are sums over all positions; None if the layer has none.
    """

    def __init__(self, states: int, shape: StateShape, dtype: torch.dtype, device: torch.device) -> None:
        self.inputs = zeros((states, shape.inputs, shape.channels), dtype, device)
        sizes = (states, shape.heads, shape.key_dim, shape.value_dim)
        self.matrices = zeros(sizes, torch.float32, device) if shape.heads else None

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return self.inputs.nbytes + (0 if self.matrices is None else self.matrices.nbytes)

    def copy(self, states: Tensor, to: Tensor) -> None:
        """Copy the states numbered `states` to those numbered `to`."""
        for pool in (self.inputs, self.matrices):
            if pool is not None:
                pool[to] = pool[states]


@dataclass(frozen=True)
class StateTiles:
    """n tiles of prompts at the same positions of n sequences."""

    rows: Tensor  # [n, TILE] int64, the tokens' rows in the step; arbitrary past a prompt's end
    real: Tensor  # [n, TILE] bool, false past a prompt's end
    before: Tensor  # [n] int64, the states that they go on from
    after: Tensor  # [n] int64, the states that they leave
    branching: Tensor  # [m] int64, which of the tiles leave a snapshot too
    snapshots: Tensor  # [m] int64, the states of these snapshots

    def leave(self, pool: Tensor, states: Tensor) -> None:
        """Write the states [n, ...] behind the tiles to `pool` [states, ...]."""
        pool[self.after] = states
        if len(self.branching):
            pool[self.snapshots] = states[self.branching]


@dataclass(frozen=True)
class PromptTile:
    """A tile of one prompt."""

    index: int  # in its sequence
    row: int  # of its first token in the step
    size: int  # number of tokens
    before: int  # the state that it goes on from
    after: int  # the state that it leaves
    snapshot: int = 0  # the state of the snapshot that it leaves too; 0 if none


def by_index(tiles: Iterable[PromptTile]) -> tuple[StateTiles, ...]:
    """Group tiles by their index, in the order in which they are computed."""
    groups: dict[int, list[PromptTile]] = {}
    for tile in tiles:
        groups.setdefault(tile.index, []).append(tile)
    return tuple(_together(group) for _, group in sorted(groups.items()))


def _together(tiles: list[PromptTile]) -> StateTiles:
    row, size = (np.array(column)[:, None] for column in zip(*((t.row, t.size) for t in tiles), strict=True))
    within = np.arange(TILE)
    real = within < size
    branching = [i for i, tile in enumerate(tiles) if tile.snapshot]
    numbers = (
        [tile.before for tile in tiles], [tile.after for tile in tiles], branching,
        [tiles[i].snapshot for i in branching],
    )  # fmt: skip
    return StateTiles(
        torch.from_numpy(np.where(real, row + within, row)),
        torch.from_numpy(real),
        *(torch.tensor(column, dtype=torch.int64) for column in numbers),
    )


@dataclass(frozen=True)
class StateTokens:
    """One token of each of n sequences."""

    rows: Tensor  # [n] int64, the tokens' rows in the step
    before: Tensor  # [n] int64, the states that they go on from
    after: Tensor  # [n] int64, the states that they leave

    def split(self, most: int) -> Iterator["StateTokens"]:
        """Yield the same tokens, at most so many at a time."""
        columns = (torch.split(column, most) for column in (self.rows, self.before, self.after))
        for parts in zip(*columns, strict=True):
            yield StateTokens(*parts)


@dataclass(frozen=True)
class StateBatch:
    """The tokens of a step in the order in which states pass through them: one part is computed after the other."""

    tiles: tuple[StateTiles, ...]
    tokens: tuple[StateTokens, ...]
    copied: Tensor  # [c] int64, states to be copied after the step
    copies: Tensor  # [c] int64, the states that they are copied to

    @classmethod
    def of_prompts(cls, lengths: list[int]) -> "StateBatch":
        """Return the batch of whole prompts of these lengths, one behind the other; prompt i has state i + 1."""
        starts = np.cumsum([0, *lengths]).tolist()
        tiles = (
            PromptTile(at // TILE, start + at, min(TILE, length - at), i + 1 if at else 0, i + 1)
            for i, (start, length) in enumerate(zip(starts, lengths, strict=False))
            for at in range(0, length, TILE)
        )
        nothing = torch.empty(0, dtype=torch.int64)
        return cls(by_index(tiles), (), nothing, nothing)

    def __iter__(self) -> Iterator[StateTiles | StateTokens]:
        yield from self.tiles
        yield from self.tokens
