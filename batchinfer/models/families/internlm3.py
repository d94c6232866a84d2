"""InternLM3 (Shanghai AI Laboratory 2025): Llama under another name."""

from batchinfer.models.families import llama

ARCHITECTURES = ("InternLM3ForCausalLM", "LlamaForCausalLM")  # transformers saves the second
layers = llama.layers
