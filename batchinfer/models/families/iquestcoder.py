"""IQuest-Coder (IQuest 2026): Llama under another name."""

from batchinfer.models.families import llama

ARCHITECTURES = ("IQuestCoderForCausalLM", "LlamaForCausalLM")  # transformers saves the second
layers = llama.layers
