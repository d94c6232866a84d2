"""Ministral 8B (Mistral AI 2024): Mistral with a window in the layers that `layer_types` names."""

from batchinfer.models.families import mistral

ARCHITECTURES = ("MinistralForCausalLM",)
DEFAULTS, FIXED = mistral.DEFAULTS, mistral.FIXED
layers, ends = mistral.layers, mistral.ends
