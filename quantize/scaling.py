"""Scales by input channel, found by trial: weights times s, inputs by s, so that rounding hurts less.

For weights alone that is AWQ (Lin et al. 2023): channels with large inputs get finer steps. Where inputs are rounded
too it is SmoothQuant (Xiao et al. 2022): outliers move from the inputs into the weights. Whoever calls folds s into the
operation that makes the inputs, so that nothing is added when the model runs.
"""

import torch
from torch import Tensor

from batchinfer.formats.scheme import WeightScheme
from batchinfer.kernels.rows import quantize_rows
from batchinfer.quantize.inputs import Inputs
from batchinfer.quantize.rtn import round_to_nearest

STRENGTHS = torch.linspace(0.1, 1.0, 10)
"""Exponents tried for the inputs' size."""
ROWS = 512
"""Rows of a weight that trials look at, about: of thousands, enough to tell scales apart."""


def search_scale(weight_NK: Tensor, inputs: Inputs, scheme: WeightScheme, tied_K: Tensor) -> Tensor:
    """The scale s [K], float32, with the least error of `x / s` times the rounded `weight * s` on the inputs' sample.

    Ones if no other does better; weights are rounded with searched clips, or scales would win what clips win alone.
    Where the scheme rounds inputs, so does the trial. Channels with the same number in `tied_K` (int64, 0 to the
    largest, none left out) get the same scale. Trials see `ROWS` of the weight's rows.
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
    """Each row as it will be when the model runs: in 8 bits, and back."""
    rows = quantize_rows(x_TK.clone())
    assert rows.scale is not None
    return (rows.values.float() - 128).mul_(rows.scale)
