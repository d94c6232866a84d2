"""`InputRounding`: whether inputs of products are rounded as the checkpoint asks, and what the report says of that."""

from torch import Tensor

from batchinfer.formats.matrix import UNROUNDED, QuantizedMatrix
from batchinfer.formats.scheme import QuantScheme
from batchinfer.kernels.float8_inputs import PER_TOKEN, Float8InputProduct, InputScales
from batchinfer.kernels.product import Product


class InputRounding:
    """Rounds the inputs of floating-point products where a checkpoint asks for that, and keeps record of all inputs.

    Only `--quantization auto` does what the checkpoint asks.
    """

    def __init__(self, scheme: QuantScheme) -> None:
        self.scheme = scheme
        self.eight_bits = False  # whether a product takes 8-bit rows
        self._by_token = self._to_float8 = self._left = False
        self._unrounded: set[str] = set()

    def in_eight_bits(self, weight: Tensor | QuantizedMatrix) -> None:
        """Record a matrix whose product takes 8-bit rows, which have a scale each."""
        self.eight_bits = True
        self._by_token |= isinstance(weight, QuantizedMatrix) and weight.inputs != PER_TOKEN

    def scales(self, weight: Tensor | QuantizedMatrix) -> InputScales | None:
        """Return how inputs are rounded for a matrix in a floating-point product; None: they are not."""
        if not isinstance(weight, QuantizedMatrix) or weight.activations == "float":
            return None
        if weight.activations in UNROUNDED:
            self._unrounded.add(weight.activations)
            return None
        if self.scheme.name != "auto" or weight.activations != "fp8":
            self._left = True
            return None
        self._to_float8 = True
        return weight.inputs

    def product(self, product: Product, scales: list[InputScales | None], rows: list[int]) -> Product:
        """Return the floating-point product of stacked matrices, with these scales and numbers of rows, to be used."""
        return product if scales == [None] * len(scales) else Float8InputProduct(product, scales, rows)

    @property
    def words(self) -> str:
        """What is to be added to a remark on how the weights are held."""
        words = ""
        if self._by_token:
            words += "; its scales of inputs are replaced by per-token scales"
        if self._to_float8:
            words += "; inputs of floating-point products are rounded to float8_e4m3fn, as it asks"
        if self._unrounded:
            words += f"; inputs are left in floating point, though it asks for {', '.join(sorted(self._unrounded))}"
        if self._left:
            words += f"; inputs are left in floating point: --quantization {self.scheme.name}"
        return words
