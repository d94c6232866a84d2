#!/usr/bin/env bash
# A compressed-tensors checkpoint says how its weights are stored in `format`, for the whole config or for each group.
# transformers 5.23.0 with compressed-tensors 0.20.0 does not follow the format of the whole: it infers one from the
# group. For packed 4-bit weights whose inputs are 8-bit integers it infers `int-quantized`: the packed tensors are
# unexpected, every weight counts as missing, and giving the missing int8 weights random numbers fails in
# `normal_kernel_cpu`, which says nothing of formats. The same file with the format written in the group loads whole.
# Guess written down before: the format of the whole config holds for groups that have none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 compressed-tensors==0.20.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import compressed_tensors
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

shape = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=2, tie_word_embeddings=False)
folder = Path("model")
transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(folder)
tensors = load_file(folder / "model.safetensors")
for name in [name for name in tensors if "proj.weight" in name]:
    weight = tensors.pop(name)
    scale = weight.unflatten(1, (-1, 32)).abs().amax(2) / 7
    numbers = (weight / scale.repeat_interleave(32, 1)).round().to(torch.int8)
    tensors |= {f"{name}_packed": pack_to_int32(numbers, 4), f"{name}_scale": scale,
                f"{name}_shape": torch.tensor(weight.shape)}
save_file(tensors, folder / "model.safetensors", {"format": "pt"})
config = json.loads((folder / "config.json").read_text())
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
found = {}
for where, own in (("the whole", {}), ("the group", {"format": "pack-quantized"})):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, **own}
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized",
                                     "quantization_status": "compressed", "ignore": ["lm_head"],
                                     "config_groups": {"group_0": group}}
    (folder / "config.json").write_text(json.dumps(config))
    try:
        _, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        found[where] = f"{sum('proj.weight' in key for key in told['missing_keys'])} weights are missing"
    except NotImplementedError as error:
        found[where] = str(error)
    print(f"transformers {transformers.__version__}, format in {where}: {found[where]}")
assert "normal_kernel_cpu" in found["the whole"] and found["the group"].startswith("0 "), f"changed: {found}"
PYTHON
