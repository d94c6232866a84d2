"""Quantized checkpoints of tiny models in each format, and what their weights stand for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.quantization.utils.mxfp_utils import maybe_convert_from_mx_exp
from packers import awq_tensors, bitsandbytes_tensors, gptq_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
Writer = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]  # a weight to (stored tensors, what they stand for)


def grouped(weight: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tensor]:
    """(q, z, scales, what they stand for) of 4 bits in groups, by the extremes of each."""
    w = weight.float().numpy().reshape(len(weight), -1, GROUP)
    low, high = w.min(-1).clip(max=0), w.max(-1).clip(min=0)
    scales = ((high - low) / 15).astype(np.float16)
    z = np.round(-low / scales).clip(1, 15).astype(np.int64)
    q = (np.round(w / scales[..., None]) + z[..., None]).clip(0, 15).astype(np.int64)
    back = ((q - z[..., None]) * scales[..., None].astype(np.float32)).reshape(weight.shape)
    return q.reshape(weight.shape), z, scales, torch.from_numpy(back.astype(np.float32))


def gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    q, z, scales, back = grouped(weight)
    return gptq_tensors(q, z, scales, [k // GROUP for k in range(weight.shape[1])], 4, "gptq"), back


def gptq_8_bits(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """8 bits, symmetric, a scale a row."""
    scales = (weight.float().abs().amax(-1, keepdim=True) / 127).half()
    q = (weight.float() / scales).round().clamp(-128, 127)
    stored = gptq_tensors(
        (q + 128).long().numpy(), np.full(scales.shape, 128), scales.numpy(), [0] * q.shape[1], 8, "gptq"
    )
    return stored, q * scales.float()


def awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    q, z, scales, back = grouped(weight)
    return awq_tensors(q, z, scales), back


NF4 = torch.special.ndtri(torch.linspace(0.03, 0.97, 16)) / torch.special.ndtri(torch.tensor(0.97))
"""Quantiles of the normal distribution, near those of NF4; a file has its own."""


def nf4(weight: Tensor, block: int = 64, double: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """Store a matrix as NF4 of bitsandbytes: blocks of numbers, row after row, with scales that are quantized too."""
    flat = weight.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax, nested = blocks.abs().amax(-1), None
    stored = absmax
    if double:
        book, offset = torch.linspace(-1, 1, 256), float(absmax.mean())
        many = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        largest = many.abs().amax(-1)
        stored = _nearest(book, many / largest[:, None]).flatten()[: len(absmax)].to(torch.uint8)
        absmax = book[stored.long()] * largest.repeat_interleave(256)[: len(absmax)] + offset
        nested = (book, largest, 256, offset)
    places = _nearest(NF4, blocks / absmax[:, None])
    back = (NF4[places] * absmax[:, None]).flatten()[: len(flat)].view(weight.shape)
    places = places.flatten()[: len(flat)].view(weight.shape)
    return bitsandbytes_tensors(places.numpy(), stored, NF4, block, nested), back


def _nearest(book: Tensor, numbers: Tensor) -> Tensor:
    return (numbers[..., None] - book).abs().argmin(-1)


def int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Store a matrix as bitsandbytes stores the weights of LLM.int8()."""
    largest = weight.float().abs().amax(-1)
    q = (weight.float() * 127 / largest[:, None]).round()
    stored = {"weight": q.to(torch.int8), "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, q * (largest[:, None] / 127)


def signed_scales(weight: Tensor, group: int) -> Tensor:
    """Scales [N, G] as AutoRound chooses them: of the sign with which a group's largest value becomes -8."""
    groups = weight.float().unflatten(1, (-1, group))
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0] / -8


def signed_gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """AutoRound in the layout of GPTQ: symmetric, no g_idx."""
    scales = signed_scales(weight, GROUP).half()
    wide = scales.float().repeat_interleave(GROUP, 1)
    q = (weight.float() / wide).round().clamp(-8, 7)
    numbers, z = (q + 8).long().numpy(), np.full(scales.shape, 8)
    stored = gptq_tensors(numbers, z, scales.numpy(), [k // GROUP for k in range(weight.shape[1])], 4, "gptq")
    del stored["g_idx"]
    return stored, q * wide


def library(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None, signed: bool = False) -> Writer:
    """By the compressed-tensors library, scales from the largest value; a static scale of inputs is `STATIC`."""
    most = 448.0 if form == "float-quantized" else 127.0 if weights["num_bits"] == 8 else 7.0
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    compressor = BaseCompressor.get_value_from_registry(form)

    def write(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        weight = weight.float()
        group = weight.shape[1] if weights["strategy"] in ("tensor", "channel") else GROUP
        scale = weight.unflatten(1, (-1, group)).abs().amax(-1) / most
        if weights["strategy"] == "tensor":
            scale = scale.amax(0)
        elif weights["strategy"] == "block":
            scale = scale.unflatten(0, (-1, GROUP)).amax(1)
        scale = signed_scales(weight, group) if signed else scale
        stored = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        if inputs is not None and not inputs["dynamic"]:
            stored["input_scale"] = torch.tensor([STATIC])
        return stored, compressor.decompress(stored, scheme)["weight"].float()

    return write


def fp8_tensor(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """One scale a tensor, and one of its inputs, as in Ministral 3."""
    scale = weight.float().abs().max() / 448
    values = (weight.float() / scale).to(torch.float8_e4m3fn)
    stored = {"weight": values, "weight_scale_inv": scale, "activation_scale": torch.tensor(STATIC)}
    return stored, values.float() * scale


def compressed(
    form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, signed: bool = False
) -> tuple[dict[str, Any], Writer]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return {**config, "ignore": ["lm_head"], "quantization_status": "compressed"}, library(
        form, weights, inputs, signed
    )


def fp4(preset: str) -> tuple[dict[str, Any], Writer]:
    """NVFP4 or MXFP4 by the compressed-tensors library, scales from the extremes of groups, as its observers find them.

    NVFP4 rounds inputs too, and has a scale for that.
    """
    scheme = preset_name_to_scheme(preset, ["Linear"])
    form = infer_module_format(torch.nn.Linear, scheme).value
    compressor, args = BaseCompressor.get_value_from_registry(form), scheme.weights

    def write(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        low, high = weight.float().unflatten(1, (-1, args.group_size)).aminmax(dim=-1)
        state = {"weight": weight.float()}
        if args.strategy == "tensor_group":
            state["weight_global_scale"] = generate_gparam(low.min(), high.max()).view(1)
        scale, _ = calculate_qparams(low, high, args, state.get("weight_global_scale"))
        stored = compressor.compress({**state, "weight_scale": maybe_convert_from_mx_exp(args, scale)}, scheme)
        if scheme.input_activations is not None and scheme.input_activations.dynamic == "local":
            stored["input_global_scale"] = torch.tensor([100.0])
        # The library's own way from the file to weights, which it takes in bfloat16.
        numbers = unpack_fp4_from_uint8(stored["weight_packed"], *weight.shape, torch.float32)
        parts = {"scale": compressor._decompress_scale(stored["weight_scale"], torch.float32), "args": args}
        parts |= {"global_scale": stored.get("weight_global_scale"), "dtype": torch.float32}
        return stored, dequantize(numbers, **parts)

    config = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    group = {**scheme.model_dump(mode="json"), "format": form}
    return {**config, "config_groups": {"group_0": group}, "quantization_status": "compressed"}, write


STATIC = 0.02  # numbers beyond 9 become 9: some inputs of a tiny model with loud weights are
DYNAMIC = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
FORMATS: dict[str, tuple[dict[str, Any], Writer]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}, gptq),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, awq),
    "pack": compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}),
    "pack-channel": compressed("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "signed-gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}, signed_gptq),
    "signed-pack": compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}, None, True),
    "signed-channel": compressed("pack-quantized", {"num_bits": 4, "strategy": "channel"}, None, True),
    "int": compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}, {**DYNAMIC, "type": "int"}),
    "fp8": compressed(
        "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, {**DYNAMIC, "type": "float"}
    ),
    "fp8-static": compressed(
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        {**DYNAMIC, "type": "float", "strategy": "tensor", "dynamic": False},
    ),
    "fp8-tensor": (
        {
            "quant_method": "fp8",
            "weight_block_size": None,
            "activation_scheme": "static",
            "modules_to_not_convert": ["model.vision_tower", "lm_head"],
        },
        fp8_tensor,
    ),
    "fp8-block": compressed(
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [GROUP, GROUP]},
        {**DYNAMIC, "type": "float", "strategy": "group", "group_size": GROUP},
    ),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, nf4),
    "bitsandbytes-int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, int8),
    "nvfp4": fp4("NVFP4"),
    "mxfp4": fp4("MXFP4A16"),
    "w4afp8": compressed(
        "int-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}, {**DYNAMIC, "type": "float"}
    ),
}


def checkpoints(
    model: Path, folder: Path, config: dict[str, Any], write: Writer, others: dict[str, Writer | None] | None = None
) -> tuple[Path, Path]:
    """(quantized, the same weights in float32) beside each other in `folder`.

    `others` are the writers of some projections by name; None: they stay in floating point.
    """
    quantized, plain = folder / "quantized", folder / "plain"
    stored: dict[str, Tensor] = {}
    stands_for: dict[str, Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        projection = name.split(".")[-2]
        writer = (others or {}).get(projection, write) if projection.endswith("_proj") else None
        if writer is not None and name.endswith(".weight"):
            parts, back = writer(tensor)
            stored |= {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in parts.items()}
        else:  # a scale a channel: held just as it is stored
            stored[name] = back = tensor
        stands_for[name] = back
    for target, tensors in ((quantized, stored), (plain, stands_for)):
        shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    raw = json.loads((model / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**raw, "quantization_config": config}))
    return quantized, plain
