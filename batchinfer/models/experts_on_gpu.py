"""Refusing experts whose products no kernel of a GPU computes, before a job's rows are read."""

from itertools import pairwise
from pathlib import Path

from torch import Tensor

from batchinfer.formats.matrix import QuantizedMatrix
from batchinfer.formats.scheme import scheme
from batchinfer.kernels.experts import DIFFERENT_INPUTS, FOUR_BITS
from batchinfer.models.config import ModelConfig
from batchinfer.models.feed_forward import Experts, FeedForward
from batchinfer.models.weight_forms import eight_bits, four_bits, stacked
from batchinfer.models.weights import SafetensorsWeights


def refuse_experts_on_gpu(model: Path, config: ModelConfig, quantization: str, products: frozenset[str]) -> None:
    """Raise `ValueError` if no kernel takes the experts of a checkpoint as `quantization` holds them.

    Two experts of the first mixture are read, which tell nearly always; loading the model refuses what is left.
    `products` names the types of 8-bit rows that the GPU multiplies.
    """
    mixture = next((layer for layer in config.layers if isinstance(layer.feed_forward, Experts)), None)
    made_for = frozenset[str]() if config.form is None else config.form.eight_bit_inputs
    held = scheme(quantization, bool(made_for & products))
    if mixture is None or held.name != "auto":
        return
    assert isinstance(mixture.feed_forward, Experts)
    weights = SafetensorsWeights(model, config)

    def read(expert: FeedForward, product: str) -> list[Tensor | QuantizedMatrix]:
        return [weights.matrix(f"{mixture.prefix}{m.name}", (m.rows, m.columns)) for m in expert.products[product]]

    for product in ("gate_up", "down"):
        found = [read(expert, product) for expert in mixture.feed_forward.experts[:2]]
        if any(eight_bits(weight, held, products) is not None for weight in found[0]):
            continue
        if not held.quantized and all(map(four_bits, found[0])) and stacked(found[0]) is not None:
            raise ValueError(f"{mixture.prefix}: {FOUR_BITS}")
        ways = [[_rounding(weight) for weight in expert] for expert in found]
        if any(one != other for one, other in pairwise(ways)) or len(set(ways[0])) > 1:
            raise ValueError(f"{mixture.prefix}: {DIFFERENT_INPUTS}")


def _rounding(weight: Tensor | QuantizedMatrix) -> object:
    """Return how inputs of the weight's floating-point product are rounded; None: they are not."""
    return weight.inputs if isinstance(weight, QuantizedMatrix) and weight.activations == "fp8" else None
