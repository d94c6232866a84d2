"""InternLM3 (Shanghai AI Laboratory 2025): the same layers as Llama."""

from batchinfer.models.families import llama

ARCHITECTURES = ("InternLM3ForCausalLM", "LlamaForCausalLM")  # transformers writes the second one when it saves
layers = llama.layers
