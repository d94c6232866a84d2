"""`load_decoder`: reads a checkpoint into a `Decoder` on its device.

Each tensor is brought to the device and its final type before the next is read, to keep the peak of memory low.
"""

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from batchinfer.formats.matrix import QuantizedMatrix
from batchinfer.formats.scheme import QuantScheme
from batchinfer.kernels.backend import Backend
from batchinfer.kernels.backend_compiled import CompiledBackend
from batchinfer.kernels.float8_inputs import InputScales
from batchinfer.kernels.norm import NormWeights
from batchinfer.kernels.product import Product
from batchinfer.models.config import ModelConfig
from batchinfer.models.decoder import Decoder, LayerWeights, PerLayerBlockWeights, PerLayerWeights
from batchinfer.models.feed_forward import Experts, FeedForward
from batchinfer.models.feed_forward_weights import ExpertsWeights, FeedForwardWeights
from batchinfer.models.input_rounding import InputRounding
from batchinfer.models.layer import Layer
from batchinfer.models.mixer import Attention
from batchinfer.models.per_layer import PerLayerEmbeddings
from batchinfer.models.recurrent import recurrent_weights
from batchinfer.models.stored_layer import bias_of, norm_weights, weight_of
from batchinfer.models.tensors import Matrix, Norm
from batchinfer.models.weight_forms import eight_bits, expanded, four_bits, rounded, stacked, whole_numbers
from batchinfer.models.weights import WeightSource


@dataclass(frozen=True)
class Loaded:
    """A decoder, and how its quantized weights were loaded."""

    decoder: Decoder
    four_bits: bool  # whether the checkpoint has 4-bit weights for floating-point inputs
    kept: bool  # whether weights stay in 4 bits in products for 8-bit inputs
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
    head, per_layer = load.head(embedding), load.per_layer_embeddings(config.ends.per_layer)
    decoder = Decoder(config, backend, load.stream, embedding, layers, norm, head, per_layer)
    weights.finish()
    return Loaded(decoder, load.four_bits, load.kept, load.unpacked, load.inputs)


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
        self.four_bits = self.kept = False
        self.unpacked: list[str] = []

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.weights.take(name, shape).to(self.backend.device)

    def norm(self, norm: Norm, prefix: str = "") -> NormWeights:
        def read(name: str, shape: tuple[int, ...]) -> Tensor:
            return self.weights.take(f"{prefix}{name}", shape)

        return norm_weights(norm, read, self.stream, self.backend.device)

    def layer(self, layer: Layer) -> LayerWeights:
        def norm(found: Norm | None) -> NormWeights | None:
            return None if found is None else self.norm(found, layer.prefix)

        def read(name: str, shape: tuple[int, ...]) -> Tensor:
            return self.tensor(f"{layer.prefix}{name}", shape)

        for beginning in layer.unread:
            self.weights.drop_all(f"{layer.prefix}{beginning}")
        a, f = layer.mixer, layer.feed_forward
        products = {name: self._product(layer.prefix, matrices) for name, matrices in a.products.items()}
        attends = isinstance(a, Attention)
        return LayerWeights(
            layer,
            input_norm=norm(layer.input_norm),
            qkv=products["qkv"],
            head_norms=tuple(self.norm(found, layer.prefix) for found in a.norms) if attends else (),
            sinks=read(a.sinks, (a.heads,)).float() if isinstance(a, Attention) and a.sinks is not None else None,
            output=products["output"],
            attention_norm=norm(layer.attention_norm),
            mlp_norm=norm(layer.mlp_norm),
            feed_forward=self._experts(layer.prefix, f) if isinstance(f, Experts) else self._block(layer.prefix, f),
            mlp_output_norm=norm(layer.mlp_output_norm),
            per_layer=self._per_layer_block(layer),
            scalar=1.0 if layer.scalar is None else float(self.tensor(f"{layer.prefix}{layer.scalar}", (1,))),
            rates=products.get("rates"),
            recurrence=None if isinstance(a, Attention) else recurrent_weights(a, read, self.c.norm_eps),
        )

    def _block(self, prefix: str, block: FeedForward) -> FeedForwardWeights:
        products = {name: self._product(prefix, matrices) for name, matrices in block.products.items()}
        return FeedForwardWeights(block, products["gate_up"], products["down"])

    def _experts(self, prefix: str, shape: Experts) -> ExpertsWeights:
        r, gate = shape.router, shape.shared_gate
        bias = None if r.bias is None else self.tensor(f"{prefix}{r.bias}", r.bias_shape).float().flatten()
        experts = tuple(self._block(prefix, expert) for expert in shape.experts)
        if len({(block.takes, block.down.takes) for block in experts}) > 1:
            raise ValueError(
                f"{prefix}{shape.experts[0].up.name} and those of other experts are quantized for different inputs; "
                "the experts of a layer must agree"
            )
        return ExpertsWeights(
            shape,
            router=self._unquantized(prefix, r.matrix),
            bias=bias,
            experts=experts,
            gate_up=self.backend.product_by_expert([block.gate_up for block in experts]),
            down=self.backend.product_by_expert([block.down for block in experts]),
            shared=None if shape.shared is None else self._block(prefix, shape.shared),
            shared_gate=None if gate is None else self._unquantized(prefix, gate),
            takes=self.stream,
        )

    def _unquantized(self, prefix: str, matrix: Matrix) -> Product:
        """Make a product in float32, whatever the model's type is."""
        (name, shape), *bias = matrix.tensors()
        added = self.tensor(f"{prefix}{bias[0][0]}", bias[0][1]).float() if bias else None
        return self.backend.linear(self.tensor(f"{prefix}{name}", shape).float(), added)

    def _per_layer_block(self, layer: Layer) -> PerLayerBlockWeights | None:
        if (block := layer.per_layer) is None:
            return None
        gate, projection = (self._product(layer.prefix, (matrix,)) for matrix in (block.gate, block.projection))
        return PerLayerBlockWeights(block, gate, projection, self.norm(block.norm, layer.prefix))

    def per_layer_embeddings(self, shape: PerLayerEmbeddings | None) -> PerLayerWeights | None:
        """Load what makes per-layer embeddings. Its product is in floating point, as the head's is."""
        if shape is None:
            return None
        table, made = shape.table, shape.projection
        rows = self.tensor(f"{table.name}.weight", (table.rows, table.columns)).to(self.dtype)
        weight = weight_of(made, self.weights.matrix(made.name, (made.rows, made.columns)).to(self.backend.device))
        product = self._floating([self._kept(weight)], None, made.name)
        product = self.inputs.product(product, [self.inputs.scales(weight)], [made.rows])
        return PerLayerWeights(shape, rows, product, self.norm(shape.norm))

    def head(self, embedding_VD: Tensor) -> Product:
        """Make the head's product. A tied head is the embedding; a copy of it in the file is not read."""
        weight: Tensor | QuantizedMatrix = embedding_VD
        head = self.c.head
        if self.c.tied:
            self.weights.drop(f"{head.name}.weight")
        else:
            weight = self.weights.matrix(head.name, (head.rows, head.columns)).to(self.backend.device)
        bias = self.tensor(f"{head.name}.bias", (head.rows,)).to(self.dtype) if head.bias else None
        kind = self._eight_bits(weight) if self.scheme.head or self.scheme.as_stored else None
        if kind is not None:
            return self.backend.linear_w8a8(*rounded(weight, kind), bias, self.dtype)
        product = self._floating([self._kept(weight)], bias, head.name)
        return self.inputs.product(product, [self.inputs.scales(weight)], [head.rows])

    def _product(self, prefix: str, matrices: tuple[Matrix, ...]) -> Product:
        """Make one product of matrices that have the same input, by stacking their rows."""
        modules = {matrix.name: matrix.module for matrix in matrices}
        weights = {name: self._weight(f"{prefix}{name}", module) for name, module in modules.items()}
        biases = {
            name: self.tensor(f"{prefix}{name}.bias", (module.rows,)) for name, module in modules.items() if module.bias
        }
        assert len(biases) in (0, len(modules)), "either all matrices of a product have a bias, or none"
        added = torch.cat([bias_of(m, biases[m.name]) for m in matrices]).to(self.dtype) if biases else None
        names = ", ".join(f"{prefix}{name}" for name in modules)
        floats: list[Tensor | QuantizedMatrix] = []
        eight: list[tuple[Tensor, Tensor] | QuantizedMatrix] = []
        kinds: set[str] = set()
        scales: list[InputScales | None] = []
        for matrix in matrices:
            weight = weight_of(matrix, weights[matrix.name])
            if (kind := self._eight_bits(weight)) is None:
                floats.append(self._kept(weight))
                scales.append(self.inputs.scales(weight))
            else:
                self.inputs.in_eight_bits(weight)
                eight.append(weight if self._keeps(weight, kind) else rounded(weight, kind))
                kinds.add(kind)
        if len(kinds) + bool(floats) > 1:
            raise ValueError(
                f"{names}: some are quantized for 8-bit inputs and some are not, or for inputs of another "
                "type; they share an input, so they must agree"
            )
        if floats:
            product = self._floating(floats, added, names)
            return self.inputs.product(product, scales, [matrix.rows for matrix in matrices])
        return self._with_eight_bit_rows(eight, kinds.pop(), added, names)

    def _with_eight_bit_rows(
        self, weights: list[tuple[Tensor, Tensor] | QuantizedMatrix], kind: str, bias: Tensor | None, names: str
    ) -> Product:
        """Make a product for 8-bit rows: with all weights in 4 bits, or with all in 8."""
        four = [weight for weight in weights if isinstance(weight, QuantizedMatrix)]
        if four and len(four) == len(weights) and (found := stacked(list(four))) is not None:
            assert isinstance(self.backend, CompiledBackend)
            self.kept = True
            return self.backend.linear_w4a8(*found, bias)
        if four:
            self.unpacked.append(names)
        eight = [rounded(weight, kind) if isinstance(weight, QuantizedMatrix) else weight for weight in weights]
        values, scale = (torch.cat(column) for column in zip(*eight, strict=True))
        return self.backend.linear_w8a8(values, scale, bias, self.dtype)

    def _keeps(self, weight: Tensor | QuantizedMatrix, kind: str) -> TypeGuard[QuantizedMatrix]:
        """Return whether the weight stays in 4 bits in a product for 8-bit rows of this type."""
        wanted = kind == "int8" and (self.scheme.as_stored or self.scheme.weight_bits == 4)
        return wanted and isinstance(self.backend, CompiledBackend) and whole_numbers(weight)

    def _weight(self, name: str, module: Matrix) -> Tensor | QuantizedMatrix:
        """Read a module's weight [rows, columns]."""
        weight = self.weights.matrix(name, (module.rows, module.columns)).to(self.backend.device)
        if four_bits(weight):
            self.four_bits = True
        elif self.scheme.weight_bits == 4 and not (isinstance(weight, QuantizedMatrix) and weight.bits == 4):
            raise ValueError(
                f"{self.scheme.name} needs a checkpoint with 4-bit weights, and {name} is not in 4 bits; make one with "
                "`batchinfer quantize`, or take --quantization w8a8-int8"
            )
        return weight

    def _kept(self, weight: Tensor | QuantizedMatrix) -> Tensor | QuantizedMatrix:
        """Return the weight unchanged if it may stay in 4 bits, else dequantized to `dtype`."""
        return weight if self.packed and four_bits(weight) else expanded(weight).to(self.dtype)

    def _floating(self, weights: list[Tensor | QuantizedMatrix], bias: Tensor | None, names: str) -> Product:
        """Make a product for floating-point rows: with all weights in 4 bits, or with all dequantized."""
        if (found := stacked(weights)) is not None:
            return self.backend.linear_w4a16(*found, bias, self.dtype)
        if any(isinstance(weight, QuantizedMatrix) for weight in weights):
            self.unpacked.append(names)
        floats = [expanded(weight).to(self.dtype) for weight in weights]
        return self.backend.linear(floats[0] if len(floats) == 1 else torch.cat(floats), bias)

    def _eight_bits(self, weight: Tensor | QuantizedMatrix) -> str | None:
        return eight_bits(weight, self.scheme, self.backend.eight_bits)
