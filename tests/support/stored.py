"""Tensors of one module, as a format reads them from a checkpoint, and comparison of the weight they stand for."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.formats.matrix import QuantizedMatrix
from batchinfer.formats.registry import checkpoint_format

N, K, GROUP = 24, 96, 32


class Stored(dict[str, Tensor]):
    """A checkpoint's tensors, and which of them were used."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__({f"m.{name}": tensor for name, tensor in tensors.items()})
        self.used: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)

    def drop(self, name: str) -> None:
        self.used.add(name)

    def take(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        if name not in self:
            raise ValueError(f"the checkpoint has no tensor {name}")
        if tuple(self[name].shape) != shape or (
            self[name].dtype not in dtypes if dtypes else not self[name].is_floating_point()
        ):
            raise ValueError(
                f"tensor {name} is {self[name].dtype} {tuple(self[name].shape)}; expected {dtypes} {shape}"
            )
        self.used.add(name)
        return self[name].clone()


def read(config: dict[str, Any], tensors: dict[str, Tensor], shape: tuple[int, int] = (N, K)) -> QuantizedMatrix:
    stored = Stored(tensors)
    matrix = checkpoint_format(config).matrix("m", shape, stored)
    assert matrix is not None
    assert stored.used >= stored.keys()
    return matrix


def check(matrix: QuantizedMatrix, expected: Tensor) -> None:
    """The weights, and the layer's output in float32."""
    torch.testing.assert_close(matrix.dequantize().double(), expected, rtol=1e-6, atol=0)
    x = torch.randn(5, expected.shape[1])
    torch.testing.assert_close(F.linear(x, matrix.dequantize()), F.linear(x, expected.float()), rtol=1e-5, atol=1e-5)
