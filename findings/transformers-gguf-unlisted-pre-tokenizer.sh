#!/usr/bin/env bash
# A GGUF file names how its tokenizer cuts text into words before byte pairs are merged (`tokenizer.ggml.pre`). For a
# name that transformers 5.23.0 has no pattern for, such as `smollm` (digits one by one) or `default` (at most three
# digits at a time), it cuts as GPT-2 does and says nothing: "123456" is one word there, and gets other ids than in
# llama.cpp v0.5.0 (node-llama-cpp 3.22.1). For the names that it lists, here `qwen2`, both give the same ids.
# Guess written down before: transformers does not look at the name at all, so that `qwen2` differs too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 gguf==0.19.0
cd "$folder"
npm install --silent --no-save --ignore-scripts node-llama-cpp@3.22.1
cat > make.py <<'PYTHON'
import gguf
import numpy as np
from tokenizers import pre_tokenizers

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
merges = ["1 2", "12 3", "123 4", "1234 5", "12345 6"]
tokens = letters + [merge.replace(" ", "") for merge in merges] + ["<|end|>"]
for name in ("qwen2", "smollm", "default"):
    writer = gguf.GGUFWriter(f"{name}/m.gguf", "llama")
    writer.add_context_length(64), writer.add_embedding_length(32), writer.add_feed_forward_length(32)
    writer.add_block_count(1), writer.add_head_count(2), writer.add_head_count_kv(2), writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre(name), writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3]), writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 1), writer.add_eos_token_id(len(tokens) - 1)
    for tensor in ("token_embd", "output"):
        writer.add_tensor(f"{tensor}.weight", np.zeros((len(tokens), 32), np.float32))
    for tensor in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{tensor}.weight", np.zeros((32, 32), np.float32))
    for tensor in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{tensor}.weight", np.ones(32, np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
PYTHON
mkdir qwen2 smollm default
venv/bin/python make.py
cat > ids.mjs <<'JAVASCRIPT'
import { writeFileSync } from "fs";
import { getLlama } from "node-llama-cpp";
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });
const ids = {};
for (const name of ["qwen2", "smollm", "default"]) {
    const model = await llama.loadModel({ modelPath: `${name}/m.gguf` });
    ids[name] = Array.from(model.tokenize("a 123456", false));
}
console.log("llama.cpp", llama.llamaCppRelease.release);
writeFileSync("ids.json", JSON.stringify(ids));
process.exit(0);
JAVASCRIPT
node ids.mjs
venv/bin/python - <<'PYTHON'
import json

import transformers

expected, same = json.load(open("ids.json")), {}
for name, ids in expected.items():
    ours = transformers.AutoTokenizer.from_pretrained(name, gguf_file="m.gguf")("a 123456", add_special_tokens=False)
    same[name] = ours["input_ids"] == ids
    print(f"{name}: llama.cpp {len(ids)} ids, transformers {transformers.__version__} {len(ours['input_ids'])}")
assert same == {"qwen2": True, "smollm": False, "default": False}, f"changed: {same}"
PYTHON
