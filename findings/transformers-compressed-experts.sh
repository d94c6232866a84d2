#!/usr/bin/env bash
# A mixture of experts in compressed-tensors' layout has a module for each expert. transformers 5.23.0 with
# compressed-tensors 0.20.0 joins them into its own fused tensors if their weights are packed in 4 bits. It does not if
# they are whole int8 (`int-quantized`, the layout of W8A8), nor if the config leaves the experts out and they are in
# floating point, whatever the rest is stored in: it collects no tensor for the fused ones, and loading ends with
# "issues during automatic conversion of the weights".
# Guess written down before: a layout that loads for dense layers loads for experts, and experts that are left out load
# as those of a checkpoint without quantization do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 compressed-tensors==0.20.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

PACKED = {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}}
WHOLE = {"weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
         "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}}


def stored(name, weight, layout):
    if layout == "int-quantized":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale}
    scale = weight.unflatten(1, (-1, 32)).abs().amax(2) / 7
    numbers = (weight / scale.repeat_interleave(32, 1)).round().to(torch.int8)
    return {f"{name}_packed": pack_to_int32(numbers, 4), f"{name}_scale": scale,
            f"{name}_shape": torch.tensor(weight.shape)}


def outcome(layout, experts):
    folder = Path(f"{layout}-{experts}")
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, moe_intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, num_experts=2, num_experts_per_tok=1, tie_word_embeddings=False)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name and (experts or ".experts." not in name)]:
        tensors |= stored(name, tensors.pop(name).float(), layout)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    group = {"targets": ["Linear"], "format": layout, **(PACKED if layout == "pack-quantized" else WHOLE)}
    left_out = ["lm_head", "re:.*mlp.gate$", *([] if experts else ["re:.*experts.*"])]
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = {"quant_method": "compressed-tensors", "format": layout, "ignore": left_out,
                                      "quantization_status": "compressed", "config_groups": {"group_0": group}}
    (folder / "config.json").write_text(json.dumps(written))
    try:
        _, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        return f"loads, {len(told['missing_keys'])} tensors missing"
    except RuntimeError as error:
        return str(error).split(".")[0]


found = {(layout, experts): outcome(layout, experts)
         for layout in ("pack-quantized", "int-quantized") for experts in (True, False)}
for (layout, experts), said in found.items():
    print(f"transformers {transformers.__version__}, {layout}, {'with' if experts else 'without'} experts: {said}")
packed = found.pop(("pack-quantized", True))
assert packed == "loads, 0 tensors missing", f"changed: {packed}"
assert all("automatic conversion" in said for said in found.values()), f"changed: {found}"
PYTHON
