"""`Norm`, `Matrix` and `Vectors`: the names and sizes of a layer's tensors, and how checkpoints store them.

This module does not import torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Norm:
    """A norm over `size` numbers: an RMSNorm, or a LayerNorm, which subtracts their mean first."""

    name: str  # module name in a checkpoint, without the layer's prefix
    size: int
    added: float = 0.0  # the weight is what is stored plus this: Gemma stores the weight's distance from 1
    factor: float = 1.0  # the result is multiplied by it
    order: tuple[int, ...] | None = None  # of the numbers within a head, as of the matrix before it
    centered: bool = False  # whether it is a LayerNorm
    weight: bool = True  # whether a checkpoint stores a weight; without one, it is 1
    bias: bool = False  # whether a checkpoint stores a bias, which only a LayerNorm may have
    heads: int | None = None  # number of heads, if each has a weight of its own
    modules: tuple[str, ...] = ()  # if each head's weights are a module of their own: these, not `name`

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of each of its tensors in a checkpoint."""
        return (self.size,) if self.heads is None or self.modules else (self.heads, self.size)

    def names(self, kind: str) -> list[str]:
        """Return the names of its tensors of a kind, weight or bias, in a checkpoint."""
        stored = self.weight if kind == "weight" else self.bias
        return [f"{module}.{kind}" for module in self.modules or (self.name,)] if stored else []

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of each of its tensors in a checkpoint."""
        yield from ((name, self.shape) for kind in ("weight", "bias") for name in self.names(kind))


@dataclass(frozen=True)
class Matrix:
    """A weight [rows, columns], which maps a token's `columns` numbers to `rows` numbers.

    A checkpoint may store several as one module, one below the other. Then they have the same name, and each says where
    it lies: in rows `first`, `first + step` and so on.
    """

    name: str  # module name in a checkpoint, without the layer's prefix
    rows: int
    columns: int
    bias: bool = False
    first: int = 0  # the row of the module that it begins with
    module_rows: int | None = None  # of the whole module; None: its own
    step: int = 1  # it takes every so-manieth row of the module
    factor: float = 1.0  # the product is multiplied by it
    order: tuple[int, ...] | None = None
    """Order of the rows within each head: row i of a head is the head's row `order[i]` in the checkpoint."""
    head_rows: int | None = None
    """Rows of the module from one head to the next; None: as many as `order` names. A module may hold, for each head,
    its rows and then those of something else."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.columns

    @property
    def stored_rows(self) -> int:
        """Number of rows of the module in the checkpoint."""
        return self.rows if self.module_rows is None else self.module_rows

    @property
    def module(self) -> "Matrix":
        """The matrix that the checkpoint stores, of which this one is all or a part."""
        return Matrix(self.name, self.stored_rows, self.columns, self.bias)

    @property
    def stored_otherwise(self) -> bool:
        """Whether the module in the checkpoint is another matrix than this one."""
        return self.stored_rows != self.rows or self.factor != 1.0 or self.order is not None

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of the module's tensors as a floating-point checkpoint stores them."""
        yield f"{self.name}.weight", (self.stored_rows, self.columns)
        if self.bias:
            yield f"{self.name}.bias", (self.stored_rows,)


def joined(name: str, *matrices: Matrix) -> list[Matrix]:
    """Return the matrices as parts of one module of this name, in which they lie one below the other."""
    rows = sum(matrix.rows for matrix in matrices)
    firsts = [sum(before.rows for before in matrices[:i]) for i in range(len(matrices))]
    return [
        replace(matrix, name=name, first=first, module_rows=rows)
        for matrix, first in zip(matrices, firsts, strict=True)
    ]


@dataclass(frozen=True)
class Vectors:
    """A tensor that is neither a matrix nor a norm: numbers for each channel or head. It is never quantized."""

    name: str  # in a checkpoint, without the layer's prefix
    shape: tuple[int, ...]
