#!/usr/bin/env bash
# transformers 5.23.0 gives `max_window_layers` opposite meanings in Qwen2 and in Qwen2-MoE. In `qwen2` the layers from
# that number on have a window, and those before have none. In `qwen2_moe` layers before that number have one, and of
# those only every second, the first included; layers from that number on have none. The fields are otherwise the same.
# Guess written down before: both take the layers from that number on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import transformers

windows = {}
for family in ("qwen2", "qwen2_moe"):
    config = transformers.AutoConfig.for_model(
        family, num_hidden_layers=6, use_sliding_window=True, sliding_window=16, max_window_layers=4
    )
    windows[family] = [i for i, kind in enumerate(config.layer_types) if kind == "sliding_attention"]
    print(transformers.__version__, family, "layers with a window:", windows[family])
assert windows["qwen2"] == [4, 5], "changed"
assert windows["qwen2_moe"] == [0, 2], "changed"
PYTHON
