"""`Method`: the quantization methods by name, and what each needs to know of a matrix's inputs."""

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
    """A quantization method."""

    name: str
    calibrated: bool = False  # needs the inputs of each matrix
    compensating: bool = False  # needs the inputs' Hessian
    scaled: bool = False  # scales the input channels first (see `channel_scales.py`)

    def check(self, scheme: WeightScheme) -> None:
        """Raise `ValueError` if the method does not fit the scheme."""
        if scheme.floating and self.name != "rtn":
            raise ValueError(
                f"method is {self.name!r}; {scheme.name} takes only rtn: its steps grow with the values, so there are "
                "no scales to search"
            )
        if self.name == "awq" and scheme.activations != "float":
            raise ValueError(f"method is 'awq'; {scheme.name} rounds inputs too: take smoothquant")
        if self.name == "smoothquant" and scheme.activations == "float":
            raise ValueError(f"method is 'smoothquant'; {scheme.name} leaves inputs as they are: take awq")

    def quantize(self, weight_NK: Tensor, scheme: WeightScheme, inputs: Inputs | None) -> QuantizedMatrix:
        """Quantize a weight. `inputs` must be given if the method is calibrated.

        Raises `ValueError` if the scheme's group size does not divide K or if the weight is not finite.
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
    """Return the method of this name. Raises `ValueError` for an unknown name."""
    if name not in METHODS:
        raise ValueError(f"method is {name!r}; it must be one of {', '.join(METHODS)}")
    return METHODS[name]
