"""Scales by input channel in a layer, folded into what makes the channels: AWQ and SmoothQuant without a trace."""

import torch
from torch import Tensor

from batchinfer.formats.scheme import WeightScheme
from batchinfer.models.layer import Attention, Matrix, Norm
from batchinfer.quantize.inputs import Inputs
from batchinfer.quantize.layer_inputs import Calibration
from batchinfer.quantize.scaling import search_scale


def scale_channels(calibration: Calibration, number: int, tensors: dict[str, Tensor], scheme: WeightScheme) -> None:
    """Search the scales on a layer's inputs in floating point, and put the scaled tensors into `tensors`.

    What the layer computes stays the same, but for the rounding of its norms' weights, which the scales make up for.
    """
    layer = calibration.config.layers[number]
    attention = layer.attention
    # The channels of all four inputs are made by something linear in its own weight.
    makers: dict[str, Norm | Matrix] = {
        "qkv": layer.input_norm,
        "output": attention.v,
        "gate_up": layer.mlp_norm,
        "down": layer.feed_forward.up,
    }
    scales: dict[str, Tensor] = {}
    for product, pieces in calibration.stages(number, tensors):
        matrices = layer.products[product]
        inputs = Inputs(pieces, calibration.tokens, matrices[0].columns, hessian=False)
        weight = torch.cat([tensors[f"{matrix.name}.weight"] for matrix in matrices])
        tied = _tied(attention) if product == "output" else torch.arange(weight.shape[1])
        scales[product] = search_scale(weight, inputs, scheme, tied)
        if product == "down":
            break  # the layer's own end is of no use yet
    for product, scale in scales.items():
        maker = makers[product].name
        made = tensors[f"{maker}.weight"]
        if made.ndim == 1:
            narrow = (made / scale).to(made.dtype)
            # A norm's weight is stored in few digits: the scale is what became of it.
            scale = torch.where(narrow == 0, 1.0, made.float() / narrow.float())
            tensors[f"{maker}.weight"] = narrow
        else:
            by_row = scale[_first_of_each(attention)] if product == "output" else scale
            tensors[f"{maker}.weight"] = made.float() / by_row[:, None]
            if f"{maker}.bias" in tensors:
                tensors[f"{maker}.bias"] = tensors[f"{maker}.bias"].float() / by_row
        for matrix in layer.products[product]:
            tensors[f"{matrix.name}.weight"] = tensors[f"{matrix.name}.weight"].float() * scale


def _tied(a: Attention) -> Tensor:
    """Which channel of the values [heads * head_dim] a channel of attention's outputs is made of."""
    head = torch.arange(a.heads)[:, None] // (a.heads // a.kv_heads)
    return (head * a.head_dim + torch.arange(a.head_dim)).flatten()


def _first_of_each(a: Attention) -> Tensor:
    """A channel of attention's outputs [kv_heads * head_dim] for each channel of the values."""
    head = torch.arange(a.kv_heads)[:, None] * (a.heads // a.kv_heads)
    return (head * a.head_dim + torch.arange(a.head_dim)).flatten()
