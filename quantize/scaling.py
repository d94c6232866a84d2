"""Searching a scale s per input channel: weights are multiplied by s and inputs divided by s, to reduce rounding error.

If only weights are rounded, this is AWQ (Lin et al. 2023): channels with large inputs get finer steps. If inputs are
rounded too, it is SmoothQuant (Xiao et al. 2022): outliers are moved from the inputs into the weights. The caller folds
s into the operation that makes the inputs, so the model needs no extra operation.
"""

import torch
from torch import Tensor

from batchinfer.formats.scheme import WeightScheme
from batchinfer.kernels.rows import quantize_rows
from batchinfer.quantize.inputs import Inputs
from batchinfer.quantize.rtn import round_to_nearest

STRENGTHS = torch.linspace(0.1, 1.0, 10)
"""Exponents that the search tries on the inputs' magnitudes."""
ROWS = 512
"""Approximate number of a weight's rows that the search uses; more are not needed to tell scales apart."""


def search_scale(weight_NK: Tensor, inputs: Inputs, scheme: WeightScheme, tied_K: Tensor) -> Tensor:
    """Return the scale s [K], float32, with the least error of `x / s` times the rounded `weight * s`.

    The error is measured on the inputs' sample and about `ROWS` of the weight's rows. Inputs are rounded too if the
    scheme does that. Weights are rounded with searched scales, as in the result: otherwise s would be credited for
    gains that clipping brings by itself. s is all ones if nothing is better. Channels with the same number in `tied_K`
    get the same s; the numbers are int64, from 0 to the largest without gaps.
    """
    weight = weight_NK[:: max(1, len(weight_NK) // ROWS)].float()
    expected = inputs.sample @ weight.t()
    integers = scheme.activations == "int8"
    channels = int(tied_K.max()) + 1

    def tied(values_K: Tensor) -> Tensor:
        return torch.zeros(channels).scatter_reduce(0, tied_K, values_K, "amax").clamp(min=1e-5)

    def error(scale_K: Tensor) -> float:
        x = inputs.sample / scale_K
        rounded = round_to_nearest(weight * scale_K, scheme, inputs.mean_square / scale_K.square()).dequantize()
        product = (_rounded(x) if integers else x) @ rounded.t()
        return float(product.sub_(expected).square_().sum(dtype=torch.float64))

    size = tied(inputs.most if integers else inputs.mean_square.sqrt())
    weights = tied(weight_NK.float().abs().amax(0))
    best = torch.ones(len(tied_K))
    least = error(best)
    for strength in STRENGTHS.tolist():
        for scale in (size**strength, size**strength / weights ** (1 - strength)):
            tried = (scale / (scale.amax() * scale.amin()).sqrt())[tied_K]
            found = error(tried)
            if found < least:
                best, least = tried, found
    return best


def _rounded(x_TK: Tensor) -> Tensor:
    """Round each row to 8 bits and back, as happens when the model runs."""
    rows = quantize_rows(x_TK.clone())
    assert rows.scale is not None
    return (rows.values.float() - 128).mul_(rows.scale)
