"""Code World Model (Meta 2025): Mistral with a window in the layers that `layer_types` names."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama, mistral
from batchinfer.models.layer import Layer

ARCHITECTURES = ("CwmForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": 8192,
    "mlp_bias": False,
}  # fmt: skip
FIXED: dict[str, Any] = {}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for.

    Raises `ValueError` if fields are missing whose defaults differ from Mistral's.
    """
    for keys in (("layer_types",), ("rope_parameters", "rope_scaling")):
        if not any(config.get(key) for key in keys):
            raise ValueError(f"config.json has no {keys[0]}; save the model anew with save_pretrained of transformers")
    return mistral.layers(config)
