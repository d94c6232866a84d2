"""Scaling a layer's input channels for AWQ and SmoothQuant.

The scales are folded into the norm or matrix that makes the channels, so the scaled model needs no extra operation.
"""

import torch
from torch import Tensor

from batchinfer.formats.scheme import WeightScheme
from batchinfer.models.feed_forward import Experts, FeedForward
from batchinfer.models.layer import Layer
from batchinfer.models.mixer import Attention
from batchinfer.models.stored_layer import rows_of
from batchinfer.models.tensors import Matrix, Norm
from batchinfer.quantize.inputs import Inputs
from batchinfer.quantize.layer_inputs import ROUTER, Calibration
from batchinfer.quantize.scaling import search_scale


def scale_channels(calibration: Calibration, number: int, tensors: dict[str, Tensor], scheme: WeightScheme) -> None:
    """Search scales on a layer's inputs in floating point, and put the scaled tensors into `tensors`.

    The layer's output stays the same. Only its norms' weights are rounded, and the scales are adjusted to that. What
    chooses experts takes the inputs of all experts: its scaled weights are in float32, and to be kept so.
    """
    layer = calibration.config.layers[number]
    attention, makers, f = layer.attention, channel_makers(layer), layer.feed_forward
    takers: dict[Norm | Matrix, list[Matrix]] = {}
    for product, maker in makers.items():
        takers.setdefault(maker, []).extend(layer.modules.get(product, ()))
    scales: dict[Norm | Matrix, Tensor] = {}
    for product, count, chunks in calibration.stages(number, tensors):
        maker = makers[product]
        if maker not in scales:
            inputs = Inputs(chunks, count, takers[maker][0].columns, hessian=False)
            weight = torch.cat([tensors[f"{matrix.name}.weight"] for matrix in takers[maker]])
            tied = _tied(attention) if product == "output" else torch.arange(weight.shape[1])
            scales[maker] = search_scale(weight, inputs, scheme, tied)
        if len(scales) == len(takers):
            break  # the layer's output is not needed yet
    for maker, scale in scales.items():
        made = tensors[f"{maker.name}.weight"]
        if isinstance(maker, Norm):
            weight = made.float() + maker.added
            narrow = (weight / scale - maker.added).to(made.dtype)
            # The norm's weight is rounded to its stored type, so take the scale that it really has afterwards.
            kept = narrow.float() + maker.added
            scale = torch.where(kept == 0, 1.0, weight / kept)
            tensors[f"{maker.name}.weight"] = narrow
        else:
            by_row = torch.ones(maker.stored_rows)
            by_row[rows_of(maker)] = scale[_first_of_each(attention)] if maker == attention.v else scale
            tensors[f"{maker.name}.weight"] = made.float() / by_row[:, None]
        if maker.bias:
            bias = tensors[f"{maker.name}.bias"].float()
            tensors[f"{maker.name}.bias"] = bias / (scale if isinstance(maker, Norm) else by_row)
        chooses = f.unquantized if isinstance(f, Experts) and maker == layer.mlp_norm else ()
        for matrix in (*takers[maker], *chooses):
            tensors[f"{matrix.name}.weight"] = tensors[f"{matrix.name}.weight"].float() * scale


def channel_makers(layer: Layer) -> dict[str, Norm | Matrix]:
    """Return, for each product, the norm or matrix in whose weight and bias its inputs are linear.

    Raises `ValueError` if a product has none.
    """
    a, f, between = layer.mixer, layer.feed_forward, _with_weight(layer.mlp_norm)
    keeps = isinstance(a, Attention) and a.limit is None and not a.value_norm and a.source is None and a.gate is None
    makers: dict[str, Norm | Matrix | None] = {
        "qkv": _with_weight(layer.input_norm),
        "output": a.v if isinstance(a, Attention) and keeps else None,
    }
    if isinstance(f, FeedForward):
        makers |= {"gate_up": between, "down": _up(f)}
    else:
        makers[ROUTER] = between
        for of, block in f.blocks.items():
            makers |= {f"{of} gate_up": between, f"{of} down": _up(block)}
    found = {product: maker for product, maker in makers.items() if maker is not None}
    if missing := sorted(makers.keys() - found.keys()):
        raise ValueError(
            f"{layer.prefix}{layer.products[missing[0]][0].name}: nothing before it takes up the scales of its inputs; "
            "take a method that does not scale them, such as gptq"
        )
    return found


def _up(block: FeedForward) -> Matrix | None:
    """Return the matrix in which the inputs of `down` are linear."""
    return block.up if block.gate is not None and block.activation != "clamped_swiglu" else None


def _with_weight(norm: Norm | None) -> Norm | None:
    return norm if norm is not None and norm.weight else None


def _tied(a: Attention) -> Tensor:
    """Return, for each channel of attention's outputs [heads * head_dim], the channel of the values it comes from."""
    head = torch.arange(a.heads)[:, None] // (a.heads // a.kv_heads)
    return (head * a.head_dim + torch.arange(a.head_dim)).flatten()


def _first_of_each(a: Attention) -> Tensor:
    """Return, for each channel of the values [kv_heads * head_dim], the first channel of the outputs made from it."""
    head = torch.arange(a.kv_heads)[:, None] * (a.heads // a.kv_heads)
    return (head * a.head_dim + torch.arange(a.head_dim)).flatten()
