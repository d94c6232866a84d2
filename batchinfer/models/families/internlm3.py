"""InternLM3 (Shanghai AI Laboratory 2025): the same layers as Llama."""

from batchinfer.models.families import llama

ARCHITECTURES = ("InternLM3ForCausalLM", "LlamaForCausalLM")  # transformers writes the second one when it saves
DEFAULTS = llama.DEFAULTS | {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5}
FIXED = llama.FIXED | {"qkv_bias": False, "bias": False}  # names of attention_bias and mlp_bias in older files
layers, ends = llama.layers, llama.ends
