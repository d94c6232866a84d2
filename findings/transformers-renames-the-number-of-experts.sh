#!/usr/bin/env bash
# transformers 5.23.0 reads `num_experts` from the config.json of a Qwen3-MoE (that is the name in the checkpoints on the
# Hub), and writes the number back as `num_local_experts` alone. So a checkpoint that was loaded and saved again has no
# `num_experts`, for which other engines look. It is the same with Mellum and MiniMax-M2, and the other way round with
# OLMoE, where `num_local_experts` is read and `num_experts` is written.
# Guess written down before: the name in the file is the name that is written.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import transformers

WRITTEN = {"qwen3_moe": "num_local_experts", "mellum": "num_local_experts", "minimax_m2": "num_local_experts",
           "olmoe": "num_experts"}
for family, written in WRITTEN.items():
    read = "num_experts" if written == "num_local_experts" else "num_local_experts"
    folder = Path(family)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": family, read: 6}))
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.num_experts == config.num_local_experts == 6, "changed: the name is not read any more"
    config.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    print(transformers.__version__, family, f"read {read}, wrote", [key for key in saved if key.endswith("_experts")])
    assert saved.get(written) == 6 and read not in saved, "changed: the name that was read is written"
PYTHON
