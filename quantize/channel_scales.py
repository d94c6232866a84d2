"""Scaling a layer's input channels for AWQ and SmoothQuant.

The scales are folded into the norm or matrix that makes the channels, so the scaled model needs no extra operation.
"""

import torch
from torch import Tensor

from batchinfer.formats.scheme import WeightScheme
from batchinfer.models.layer import Attention, Matrix, Norm
from batchinfer.quantize.inputs import Inputs
from batchinfer.quantize.layer_inputs import Calibration
from batchinfer.quantize.scaling import search_scale


def scale_channels(calibration: Calibration, number: int, tensors: dict[str, Tensor], scheme: WeightScheme) -> None:
    """Search scales on a layer's inputs in floating point, and put the scaled tensors into `tensors`.

    The layer's output stays the same. Only its norms' weights are rounded, and the scales are adjusted to that.
    """
    layer = calibration.config.layers[number]
    attention = layer.attention
    # The inputs of each product are linear in the weight of this norm or matrix.
    makers: dict[str, Norm | Matrix] = {
        "qkv": layer.input_norm,
        "output": attention.v,
        "gate_up": layer.mlp_norm,
        "down": layer.feed_forward.up,
    }
    scales: dict[str, Tensor] = {}
    for product, chunks in calibration.stages(number, tensors):
        matrices = layer.products[product]
        inputs = Inputs(chunks, calibration.tokens, matrices[0].columns, hessian=False)
        weight = torch.cat([tensors[f"{matrix.name}.weight"] for matrix in matrices])
        tied = _tied(attention) if product == "output" else torch.arange(weight.shape[1])
        scales[product] = search_scale(weight, inputs, scheme, tied)
        if product == "down":
            break  # the layer's output is not needed yet
    for product, scale in scales.items():
        maker = makers[product].name
        made = tensors[f"{maker}.weight"]
        if made.ndim == 1:
            narrow = (made / scale).to(made.dtype)
            # The norm's weight is rounded to its stored type, so take the scale that it really has afterwards.
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
    """Return, for each channel of attention's outputs [heads * head_dim], the channel of the values it comes from."""
    head = torch.arange(a.heads)[:, None] // (a.heads // a.kv_heads)
    return (head * a.head_dim + torch.arange(a.head_dim)).flatten()


def _first_of_each(a: Attention) -> Tensor:
    """Return, for each channel of the values [kv_heads * head_dim], the first channel of the outputs made from it."""
    head = torch.arange(a.kv_heads)[:, None] * (a.heads // a.kv_heads)
    return (head * a.head_dim + torch.arange(a.head_dim)).flatten()
