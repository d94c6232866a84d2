"""`load_decoder`: reads a checkpoint into a `Decoder` on its device.

Each tensor is brought to the device and its final type before the next is read, to keep the peak of memory low.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.formats.matrix import QuantizedMatrix, quantize_channels
from batchinfer.formats.scheme import QuantScheme
from batchinfer.kernels.backend import Backend, Product
from batchinfer.kernels.float8_inputs import InputScales
from batchinfer.kernels.linear_w4a16 import GRAIN, GROUPS
from batchinfer.models.config import ModelConfig
from batchinfer.models.decoder import Decoder, LayerWeights
from batchinfer.models.input_rounding import InputRounding
from batchinfer.models.layer import Attention, Layer, Matrix, Norm
from batchinfer.models.recurrent import recurrent_weights
from batchinfer.models.stored_layer import bias_of, norm_weight, weight_of
from batchinfer.models.weights import WeightSource


@dataclass(frozen=True)
class Loaded:
    """A decoder, and how its quantized weights were loaded."""

    decoder: Decoder
    four_bits: bool  # whether the checkpoint has 4-bit weights for floating-point inputs
    unpacked: list[str]  # products whose 4-bit weights had to be dequantized, unlike those of the others
    inputs: InputRounding


def load_decoder(
    config: ModelConfig,
    scheme: QuantScheme,
    dtype: torch.dtype,
    weights: WeightSource,
    backend: Backend,
    packed: bool = False,
) -> Loaded:
    """Load a checkpoint to the backend's device.

    With a quantized scheme, matrix products take 8-bit rows. Otherwise they are in `dtype`, and quantized matrices of
    the checkpoint are dequantized to it; with `packed`, 4-bit matrices stay in 4 bits where possible. The embedding and
    the head are in `dtype`, unless the scheme or the checkpoint quantizes the head. Raises `ValueError` if the
    checkpoint does not fit `config` or `scheme`.
    """
    load = _Loader(config, scheme, dtype, weights, backend, packed)
    table = config.embedding
    embedding = load.tensor(f"{table.name}.weight", (table.rows, table.columns)).to(dtype)
    layers = [load.layer(layer) for layer in config.layers]
    norm = load.norm(config.norm)
    decoder = Decoder(config, backend, load.stream, embedding, layers, norm, load.head(embedding))
    weights.finish()
    return Loaded(decoder, load.four_bits, load.unpacked, load.inputs)


class _Loader:
    """Loads tensors by name and makes the decoder's layers of them."""

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
        self.inputs = InputRounding(scheme)
        self.four_bits = False
        self.unpacked: list[str] = []

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.weights.take(name, shape).to(self.backend.device)

    def norm(self, norm: Norm, prefix: str = "") -> Tensor:
        return norm_weight(norm, self.tensor(f"{prefix}{norm.name}.weight", (norm.size,)), self.stream)

    def layer(self, layer: Layer) -> LayerWeights:
        def norm(found: Norm | None) -> Tensor | None:
            return None if found is None else self.norm(found, layer.prefix)

        def pair(found: tuple[Norm, Norm] | None) -> tuple[Tensor, Tensor] | None:
            return None if found is None else (self.norm(found[0], layer.prefix), self.norm(found[1], layer.prefix))

        def read(name: str, shape: tuple[int, ...]) -> Tensor:
            return self.tensor(f"{layer.prefix}{name}", shape)

        products = {name: self._product(layer.prefix, matrices) for name, matrices in layer.products.items()}
        mixer = layer.mixer
        return LayerWeights(
            layer,
            input_norm=norm(layer.input_norm),
            qkv=products["qkv"],
            head_norms=pair(mixer.head_norms) if isinstance(mixer, Attention) else None,
            output=products["output"],
            attention_norm=norm(layer.attention_norm),
            mlp_norm=norm(layer.mlp_norm),
            gate_up=products["gate_up"],
            down=products["down"],
            mlp_output_norm=norm(layer.mlp_output_norm),
            rates=products.get("rates"),
            recurrence=None if isinstance(mixer, Attention) else recurrent_weights(mixer, read, self.c.norm_eps),
        )

    def head(self, embedding_VD: Tensor) -> Product:
        """Make the head's product. A tied head is the embedding; a copy of it in the file is not read."""
        weight: Tensor | QuantizedMatrix = embedding_VD
        head = self.c.head
        if self.c.tied:
            self.weights.drop(f"{head.name}.weight")
        else:
            weight = self.weights.matrix(head.name, (head.rows, head.columns)).to(self.backend.device)
        kind = self._eight_bits(weight) if self.scheme.head or self.scheme.as_stored else None
        if kind is not None:
            return self.backend.linear_w8a8(*_rounded(weight, kind), out=self.dtype)
        product = self._floating([self._kept(weight)], None, head.name)
        return self.inputs.product(product, [self.inputs.scales(weight)], [head.rows])

    def _product(self, prefix: str, matrices: tuple[Matrix, ...]) -> Product:
        """Make one product of matrices that have the same input, by stacking their rows."""
        modules = {matrix.name: matrix.module for matrix in matrices}
        weights = {n: self._matrix(f"{prefix}{n}", (m.rows, m.columns)) for n, m in modules.items()}
        biases = {n: self.tensor(f"{prefix}{n}.bias", (m.rows,)) for n, m in modules.items() if m.bias}
        assert len(biases) in (0, len(modules)), "either all matrices of a product have a bias, or none"
        added = torch.cat([bias_of(m, biases[m.name]) for m in matrices]).to(self.dtype) if biases else None
        names = ", ".join(f"{prefix}{name}" for name in modules)
        floats: list[Tensor | QuantizedMatrix] = []
        rounded: list[tuple[Tensor, Tensor]] = []
        scales: list[InputScales | None] = []
        for matrix in matrices:
            weight = weight_of(matrix, weights[matrix.name])
            if (kind := self._eight_bits(weight)) is None:
                floats.append(self._kept(weight))
                scales.append(self.inputs.scales(weight))
            else:
                self.inputs.in_eight_bits(weight)
                rounded.append(_rounded(weight, kind))
        if len({values.dtype for values, _ in rounded}) + bool(floats) > 1:
            raise ValueError(
                f"{names}: some are quantized for 8-bit inputs and some are not, or for inputs of another "
                "type; they share an input, so they must agree"
            )
        if floats:
            product = self._floating(floats, added, names)
            return self.inputs.product(product, scales, [matrix.rows for matrix in matrices])
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
        """Return the weight unchanged if it may stay in 4 bits, else dequantized to `dtype`."""
        return weight if self.packed and _four_bits(weight) else _expanded(weight).to(self.dtype)

    def _floating(self, weights: list[Tensor | QuantizedMatrix], bias: Tensor | None, names: str) -> Product:
        """Make a product for floating-point rows: with all weights in 4 bits, or with all dequantized."""
        if (stacked := _stacked(weights)) is not None:
            return self.backend.linear_w4a16(*stacked, bias, self.dtype)
        if any(isinstance(weight, QuantizedMatrix) for weight in weights):
            self.unpacked.append(names)
        expanded = [_expanded(weight).to(self.dtype) for weight in weights]
        return self.backend.linear(expanded[0] if len(expanded) == 1 else torch.cat(expanded), bias)

    def _eight_bits(self, weight: Tensor | QuantizedMatrix) -> str | None:
        """Return "int8" or "fp8" if the weight's product takes 8-bit rows of this type, else None."""
        if not self.scheme.as_stored:
            return self.scheme.activations if self.scheme.quantized else None
        if not isinstance(weight, QuantizedMatrix) or weight.activations not in self.backend.eight_bits:
            return None
        # Rounding other weights to float8 by channel would lose more than the 8-bit product gains.
        if weight.activations == "fp8" and (weight.inputs.group or weight.by_channel(torch.float8_e4m3fn) is None):
            return None
        return weight.activations


def _rounded(weight: Tensor | QuantizedMatrix, kind: str) -> tuple[Tensor, Tensor]:
    """Return (values [N, K] in int8 or float8_e4m3fn, per-channel scales [N]).

    Weights that are stored in this form are unchanged; others are rounded to it.
    """
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    stored = weight.by_channel(dtype) if isinstance(weight, QuantizedMatrix) else None
    return quantize_channels(_expanded(weight), dtype) if stored is None else stored


def _four_bits(weight: Tensor | QuantizedMatrix) -> bool:
    """Return whether the weight is of whole numbers of 4 bits, for floating-point inputs."""
    return (
        isinstance(weight, QuantizedMatrix)
        and weight.bits == 4
        and weight.code_book is None
        and weight.activations == "float"
    )


def _stacked(weights: list[Tensor | QuantizedMatrix]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Stack weights to (values, scale, zero point) for `LinearW4A16`; None if it cannot take them as one matrix."""
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
