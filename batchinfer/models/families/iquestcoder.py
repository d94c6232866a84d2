"""IQuest-Coder (IQuest 2026): the same layers as Llama."""

from batchinfer.models.families import llama

ARCHITECTURES = ("IQuestCoderForCausalLM", "LlamaForCausalLM")  # transformers writes the second one when it saves
DEFAULTS = llama.DEFAULTS | {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
FIXED = llama.FIXED | {"use_sliding_window": False}
layers, ends = llama.layers, llama.ends
