#!/usr/bin/env bash
# transformers 5.23.0 has a config class for `internlm3` and for `iquestcoder`, and no model class for either: their
# models are LlamaForCausalLM. A checkpoint that it saves says `"model_type": "internlm3"` beside
# `"architectures": ["LlamaForCausalLM"]`, while the checkpoint that its authors published says InternLM3ForCausalLM.
# So a loader that compares the two fields, or that chooses its code by `architectures`, meets two names for one model.
# Guess written down before: the saved file names InternLM3ForCausalLM and IQuestCoderForCausalLM.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import transformers

shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=2, head_dim=16, pad_token_id=0)
for family, expected in (("internlm3", "InternLM3ForCausalLM"), ("iquestcoder", "IQuestCoderForCausalLM")):
    config = transformers.AutoConfig.for_model(family, **shape)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(family)
    saved = json.loads(Path(family, "config.json").read_text())
    print(transformers.__version__, saved["model_type"], saved["architectures"])
    assert saved["model_type"] == family
    assert saved["architectures"] == ["LlamaForCausalLM"], "changed: the file names another class"
    assert not hasattr(transformers, expected), "changed: the class is there now"
PYTHON
