"""Scales by input channel in a layer, folded into what makes the channels: AWQ and SmoothQuant without a trace."""

import torch
from torch import Tensor

from batchinfer.formats.scheme import WeightScheme
from batchinfer.models.config import ModelConfig
from batchinfer.quantize.inputs import Inputs
from batchinfer.quantize.layer_inputs import PRODUCTS, Calibration
from batchinfer.quantize.scaling import search_scale

_MAKERS = {
    "qkv": "input_layernorm",
    "output": "self_attn.v_proj",
    "gate_up": "post_attention_layernorm",
    "down": "mlp.up_proj",
}
"""What makes the inputs of a product. The channels of all four are made by something linear in its own weight."""


def scale_channels(
    config: ModelConfig, calibration: Calibration, layer: int, tensors: dict[str, Tensor], scheme: WeightScheme
) -> None:
    """Search the scales on a layer's inputs in floating point, and put the scaled tensors into `tensors`.

    What the layer computes stays the same, but for the rounding of its norms' weights, which the scales make up for.
    """
    scales: dict[str, Tensor] = {}
    for product, pieces in calibration.stages(layer, tensors):
        inputs = Inputs(pieces, calibration.tokens, calibration.columns(product), hessian=False)
        weight = torch.cat([tensors[f"{part}.weight"] for part in PRODUCTS[product]])
        tied = _tied(config) if product == "output" else torch.arange(weight.shape[1])
        scales[product] = search_scale(weight, inputs, scheme, tied)
        if product == "down":
            break  # the layer's own end is of no use yet
    for product, scale in scales.items():
        maker = _MAKERS[product]
        made = tensors[f"{maker}.weight"]
        if made.ndim == 1:
            narrow = (made / scale).to(made.dtype)
            # A norm's weight is stored in few digits: the scale is what became of it.
            scale = torch.where(narrow == 0, 1.0, made.float() / narrow.float())
            tensors[f"{maker}.weight"] = narrow
        else:
            by_row = scale[_first_of_each(config)] if product == "output" else scale
            tensors[f"{maker}.weight"] = made.float() / by_row[:, None]
            if f"{maker}.bias" in tensors:
                tensors[f"{maker}.bias"] = tensors[f"{maker}.bias"].float() / by_row
        for part in PRODUCTS[product]:
            tensors[f"{part}.weight"] = tensors[f"{part}.weight"].float() * scale


def _tied(config: ModelConfig) -> Tensor:
    """Which channel of the values [heads * head_dim] a channel of attention's outputs is made of."""
    head = torch.arange(config.heads)[:, None] // (config.heads // config.kv_heads)
    return (head * config.head_dim + torch.arange(config.head_dim)).flatten()


def _first_of_each(config: ModelConfig) -> Tensor:
    """A channel of attention's outputs [kv_heads * head_dim] for each channel of the values."""
    head = torch.arange(config.kv_heads)[:, None] * (config.heads // config.kv_heads)
    return (head * config.head_dim + torch.arange(config.head_dim)).flatten()
