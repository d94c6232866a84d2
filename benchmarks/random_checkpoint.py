"""A checkpoint of noise in the shape of a model, with the demo's tokenizer: for measuring time and memory."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / "examples" / "stdlib" / "target"


def write_random_checkpoint(shape: Path, folder: Path) -> Path:
    """Into `folder`, one file of bfloat16 weights for `shape`, a config.json of the Llama family."""
    c = json.loads(shape.read_text())
    hidden, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    wide, narrow = (c[heads] * c["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    sizes = {f"self_attn.{name}": (rows, hidden) for name, rows in (("q_proj", wide), ("k_proj", narrow))}
    sizes |= {"self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, wide)}
    sizes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(vocab, hidden).bfloat16()}
    tensors |= {"lm_head.weight": torch.randn(vocab, hidden).bfloat16(), "model.norm.weight": torch.ones(hidden)}
    for i in range(c["num_hidden_layers"]):
        for name, size in sizes.items():
            # As large as keeps activations at their size from layer to layer.
            tensors[f"model.layers.{i}.{name}.weight"] = (torch.randn(size) / size[1] ** 0.5).bfloat16()
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(hidden)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(shape, folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder
