"""IQuest-Coder (IQuest 2026): the same layers as Llama."""

from batchinfer.models.families import llama

ARCHITECTURES = ("IQuestCoderForCausalLM", "LlamaForCausalLM")  # transformers writes the second one when it saves
layers = llama.layers
