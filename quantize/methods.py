"""`Method`: how a matrix gets into few bits, by name; what it needs to know of its inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.formats.matrix import QuantizedMatrix
from batchinfer.formats.scheme import WeightScheme
from batchinfer.quantize.gptq import gptq
from batchinfer.quantize.inputs import Inputs
from batchinfer.quantize.rtn import round_to_nearest


@dataclass(frozen=True)
class Method:
    """One way of quantizing."""

    name: str
    calibrated: bool = False  # wants the inputs of each matrix
    compensating: bool = False  # wants their products with each other
    scaled: bool = False  # scales input channels first, folded into what makes them

    def check(self, scheme: WeightScheme) -> None:
        """A `ValueError` if it has nothing to do in this scheme."""
        if scheme.floating and self.name != "rtn":
            raise ValueError(f"method is {self.name!r}; {scheme.name} has rtn only: its steps grow with the values")
        if self.name == "awq" and scheme.activations != "float":
            raise ValueError(f"method is 'awq'; {scheme.name} rounds inputs too: take smoothquant")
        if self.name == "smoothquant" and scheme.activations == "float":
            raise ValueError(f"method is 'smoothquant'; {scheme.name} leaves inputs as they are: take awq")

    def quantize(self, weight_NK: Tensor, scheme: WeightScheme, inputs: Inputs | None) -> QuantizedMatrix:
        """The weight in the scheme's bits; `inputs` are there if the method is calibrated.

        A `ValueError` if the scheme's groups do not divide K or something is not finite.
        """
        if self.name == "rtn":
            return round_to_nearest(weight_NK, scheme)
        if not self.calibrated:
            return round_to_nearest(weight_NK, scheme, torch.ones(weight_NK.shape[1]))
        assert inputs is not None, "a calibrated method needs inputs"
        if self.compensating:
            return gptq(weight_NK, scheme, inputs)
        return round_to_nearest(weight_NK, scheme, inputs.mean_square)


_METHODS = (
    Method("rtn"),
    Method("rtn-mse"),
    Method("rtn-importance", calibrated=True),
    Method("gptq", calibrated=True, compensating=True),
    Method("awq", calibrated=True, scaled=True),
    Method("smoothquant", calibrated=True, scaled=True),
)
METHODS = {method.name: method for method in _METHODS}


def method(name: str) -> Method:
    """The method of a name. A `ValueError` lists the names there are."""
    if name not in METHODS:
        raise ValueError(f"method is {name!r}; it must be one of {', '.join(METHODS)}")
    return METHODS[name]
