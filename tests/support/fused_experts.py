"""Checkpoints whose experts lie in two tensors, as they are published, made of ones with modules for each expert."""

import json
import re
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

FUSED = {"gpt_oss": "gpt_oss", "granitemoe": "granite", "granitemoeshared": "granite"}
"""The form in which each family's checkpoints hold experts, of families that transformers reads in no other form."""


def fused(tensors: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """The same tensors with the experts of a layer in two: in the form qwen3_5, gpt_oss or granite."""
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for at in {name.partition(".experts.")[0] for name in tensors if ".experts." in name}:
        count = 1 + max(int(found[1]) for name in tensors if (found := re.match(rf"{at}\.experts\.(\d+)\.", name)))

        def of_all(part: str, kind: str = "weight", at: str = at, count: int = count) -> Tensor:
            return torch.stack([tensors[f"{at}.experts.{i}.{part}_proj.{kind}"] for i in range(count)])

        gate, up, down = map(of_all, ("gate", "up", "down"))
        if form == "gpt_oss":  # [E, columns, rows], the rows of gate and up by turns
            biases = of_all("gate", "bias"), of_all("up", "bias")
            kept |= {
                f"{at}.experts.gate_up_proj": torch.stack([gate, up], 2).flatten(1, 2).transpose(1, 2).contiguous(),
                f"{at}.experts.gate_up_proj_bias": torch.stack(biases, 2).flatten(1),
                f"{at}.experts.down_proj": down.transpose(1, 2).contiguous(),
                f"{at}.experts.down_proj_bias": of_all("down", "bias"),
            }
        elif form == "granite":
            kept |= {f"{at}.input_linear.weight": torch.cat([gate, up], 1), f"{at}.output_linear.weight": down}
        else:
            kept |= {f"{at}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{at}.experts.down_proj": down}
    return kept


def decompressed(folder: Path) -> dict[str, Tensor]:
    """The weights of a compressed-tensors checkpoint, expanded to float32 by the library of that name."""
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate(group)
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    found = {name: tensor.float() for name, tensor in tensors.items() if ".weight_" not in name}
    for module in {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}:
        stored = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{module}.w")}
        found[f"{module}.weight"] = compressor.decompress(stored, scheme)["weight"].float()
    return found


def write(tensors: dict[str, Tensor], folder: Path, config: Path) -> Path:
    """A checkpoint in floating point, with the fields of another one's config.json."""
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    raw = json.loads((config / "config.json").read_text())
    raw.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def for_transformers(case: str, quantized: Path, folder: Path) -> Path:
    """A quantized checkpoint in a form that transformers reads: itself, or with its weights expanded and fused."""
    form = FUSED.get(case)
    return quantized if form is None else write(fused(decompressed(quantized), form), folder, quantized)
