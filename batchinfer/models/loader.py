"""`load_decoder`: a checkpoint's tensors to a `Decoder` on its device, each in its final type before the next."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from batchinfer.formats.matrix import QuantizedMatrix, quantize_channels
from batchinfer.formats.scheme import QuantScheme
from batchinfer.kernels.backend import Backend, Product
from batchinfer.kernels.linear_w4a16 import GRAIN, GROUPS
from batchinfer.models.config import ModelConfig
from batchinfer.models.decoder import Decoder, LayerWeights
from batchinfer.models.layer import Layer, Matrix, Norm
from batchinfer.models.weights import WeightSource


@dataclass(frozen=True)
class Loaded:
    """A decoder, and what became of weights in few bits."""

    decoder: Decoder
    four_bits: bool  # whether the checkpoint has weights of 4 bits for rows in floating point
    unpacked: list[str]  # products of them that had to be expanded, though the others were not


def load_decoder(
    config: ModelConfig,
    scheme: QuantScheme,
    dtype: torch.dtype,
    weights: WeightSource,
    backend: Backend,
    packed: bool = False,
) -> Loaded:
    """A checkpoint on the backend's device.

    With a quantized scheme matrix products are of 8-bit rows; otherwise they are in `dtype`, and matrices that the
    checkpoint holds in few bits are expanded to it, unless they are `packed`: of 4 bits and left so. Embeddings and
    head are in `dtype` (the head in fewer bits if the scheme or the checkpoint says so).
    """
    load = _Loader(config, scheme, dtype, weights, backend, packed)
    table = config.embedding
    embedding = load.tensor(f"{table.name}.weight", (table.rows, table.columns)).to(dtype)
    layers = [load.layer(layer) for layer in config.layers]
    norm = load.norm(config.norm)
    decoder = Decoder(config, backend, load.stream, embedding, layers, norm, load.head(embedding))
    weights.finish()
    return Loaded(decoder, load.four_bits, load.unpacked)


class _Loader:
    """Tensors by name into layers: each is brought to its device and final type before the next is read."""

    def __init__(
        self,
        config: ModelConfig,
        scheme: QuantScheme,
        dtype: torch.dtype,
        weights: WeightSource,
        backend: Backend,
        packed: bool,
    ) -> None:
        self.c, self.scheme, self.dtype, self.weights, self.packed = config, scheme, dtype, weights, packed
        self.backend = backend
        self.stream = backend.stream(dtype, scheme.quantized)
        self.four_bits = False
        self.unpacked: list[str] = []

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.weights.take(name, shape).to(self.backend.device)

    def norm(self, norm: Norm, prefix: str = "") -> Tensor:
        return self.tensor(f"{prefix}{norm.name}.weight", (norm.size,)).to(self.stream)

    def layer(self, layer: Layer) -> LayerWeights:
        norm = partial(self.norm, prefix=layer.prefix)
        of_heads = layer.attention.head_norms
        return LayerWeights(
            layer,
            input_norm=norm(layer.input_norm),
            head_norms=None if of_heads is None else (norm(of_heads[0]), norm(of_heads[1])),
            mlp_norm=norm(layer.mlp_norm),
            **{name: self._product(layer.prefix, matrices) for name, matrices in layer.products.items()},
        )

    def head(self, embedding_VD: Tensor) -> Product:
        """The embedding again where the two are tied; a copy of it in the file need not be read then."""
        weight: Tensor | QuantizedMatrix = embedding_VD
        head = self.c.head
        if self.c.tied:
            self.weights.drop(f"{head.name}.weight")
        else:
            weight = self.weights.matrix(head.name, (head.rows, head.columns)).to(self.backend.device)
        kind = self._eight_bits(weight) if self.scheme.head or self.scheme.as_stored else None
        if kind is not None:
            return self.backend.linear_w8a8(*_rounded(weight, kind), out=self.dtype)
        return self._floating({head.name: self._kept(weight)}, None)

    def _product(self, prefix: str, matrices: tuple[Matrix, ...]) -> Product:
        """Matrices that read the same input, stacked into one."""
        parts = {f"{prefix}{matrix.name}": matrix for matrix in matrices}
        biases = [self.tensor(f"{name}.bias", (matrix.rows,)) for name, matrix in parts.items() if matrix.bias]
        assert len(biases) in (0, len(parts)), "a product has a bias, or none"
        added = torch.cat(biases).to(self.dtype) if biases else None
        floats: dict[str, Tensor | QuantizedMatrix] = {}
        rounded: list[tuple[Tensor, Tensor]] = []
        for name, matrix in parts.items():
            weight = self._matrix(name, (matrix.rows, matrix.columns))
            if (kind := self._eight_bits(weight)) is None:
                floats[name] = self._kept(weight)
            else:
                rounded.append(_rounded(weight, kind))
        if len({values.dtype for values, _ in rounded}) + bool(floats) > 1:
            raise ValueError(
                f"{', '.join(parts)}: some are quantized for 8-bit inputs and some are not, or for others; they share "
                "an input"
            )
        if floats:
            return self._floating(floats, added)
        values, scale = (torch.cat(column) for column in zip(*rounded, strict=True))
        return self.backend.linear_w8a8(values, scale, added, self.dtype)

    def _matrix(self, name: str, shape: tuple[int, int]) -> Tensor | QuantizedMatrix:
        weight = self.weights.matrix(name, shape).to(self.backend.device)
        if _four_bits(weight):
            self.four_bits = True
        elif self.scheme.weight_bits == 4 and not (isinstance(weight, QuantizedMatrix) and weight.bits == 4):
            raise ValueError(
                f"{self.scheme.name} needs a checkpoint with 4-bit weights, and {name} is not in 4 bits; make one with "
                "`batchinfer quantize`, or take --quantization w8a8-int8"
            )
        return weight

    def _kept(self, weight: Tensor | QuantizedMatrix) -> Tensor | QuantizedMatrix:
        """As it is stored if it may stay in 4 bits, else expanded at once."""
        return weight if self.packed and _four_bits(weight) else _expanded(weight).to(self.dtype)

    def _floating(self, parts: dict[str, Tensor | QuantizedMatrix], bias: Tensor | None) -> Product:
        """The product of floating-point rows: all parts in 4 bits, or all expanded."""
        if (stacked := _stacked(list(parts.values()))) is not None:
            return self.backend.linear_w4a16(*stacked, bias, self.dtype)
        if any(isinstance(weight, QuantizedMatrix) for weight in parts.values()):
            self.unpacked.append(", ".join(parts))
        expanded = [_expanded(weight).to(self.dtype) for weight in parts.values()]
        return self.backend.linear(expanded[0] if len(expanded) == 1 else torch.cat(expanded), bias)

    def _eight_bits(self, weight: Tensor | QuantizedMatrix) -> str | None:
        """ "int8" or "fp8" if the product is to be one of such rows and such weights."""
        if not self.scheme.as_stored:
            return self.scheme.activations if self.scheme.quantized else None
        if isinstance(weight, QuantizedMatrix) and weight.activations in self.backend.eight_bits:
            return weight.activations
        return None


def _rounded(weight: Tensor | QuantizedMatrix, kind: str) -> tuple[Tensor, Tensor]:
    """(int8 or float8_e4m3fn [N, K], scale [N]): as they are stored where they are just that, else rounded to it."""
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    stored = weight.by_channel(dtype) if isinstance(weight, QuantizedMatrix) else None
    return quantize_channels(_expanded(weight), dtype) if stored is None else stored


def _four_bits(weight: Tensor | QuantizedMatrix) -> bool:
    return isinstance(weight, QuantizedMatrix) and weight.bits == 4 and weight.activations == "float"


def _stacked(weights: list[Tensor | QuantizedMatrix]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Values, scale and zero point for `LinearW4A16`; None where it does not take all of these as one."""
    matrices = [weight for weight in weights if isinstance(weight, QuantizedMatrix)]
    groups = [found for matrix in matrices if (found := matrix.by_group(GROUPS)) is not None]
    if len(groups) < len(weights) or len({scale.shape[1] for scale, _ in groups}) > 1:
        return None
    values = torch.cat([matrix.values for matrix in matrices])
    if len(values) % GRAIN:
        return None
    scale, zero_point = (torch.cat(column) for column in zip(*groups, strict=True))
    return values, scale, zero_point


def _expanded(weight: Tensor | QuantizedMatrix) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedMatrix) else weight
