"""VaultGemma (Google 2025): Gemma 2 without norms of the blocks' outputs."""

from dataclasses import replace

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import gemma2
from batchinfer.models.layer import Layer

ARCHITECTURES = ("VaultGemmaForCausalLM",)
DEFAULTS, FIXED, ends = gemma2.DEFAULTS, gemma2.FIXED, gemma2.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    return [replace(layer, attention_norm=None, mlp_output_norm=None) for layer in gemma2.layers(config)]
