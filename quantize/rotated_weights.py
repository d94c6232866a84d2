"""`RotatedWeights`: a checkpoint whose hidden states are rotated, which leaves what it computes as it was.

QuaRot's offline part (Ashkboos et al. 2024): the norms' gains go into the matrices behind them, for a norm without
gains commutes with a rotation. What writes the hidden state then writes it rotated, and what reads it turns it back.
Values are rotated within each head likewise, and turned back by the output projection.
"""

import torch
from torch import Tensor

from batchinfer.models.config import ModelConfig
from batchinfer.models.weights import SafetensorsWeights
from batchinfer.quantize.rotation import rotation

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_NORM_BEFORE = {
    "q_proj": "input_layernorm",
    "k_proj": "input_layernorm",
    "v_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm",
    "up_proj": "post_attention_layernorm",
}
_NORMS = tuple({f"{norm}.weight" for norm in _NORM_BEFORE.values()})


class RotatedWeights:
    """Tensors by name, rotated as they are read. A tied head becomes one of its own, for the gains are in it."""

    def __init__(self, weights: SafetensorsWeights, config: ModelConfig, seed: int) -> None:
        self.weights, self.config = weights, config
        self.hidden = rotation(config.hidden_size, seed)
        self.head = rotation(config.head_dim, seed + 1)

    def names(self) -> list[str]:
        """Of all tensors."""
        return sorted({*self.weights.names(), HEAD})

    def read(self, name: str) -> Tensor:
        """The tensor: matrices of layers in float32, the others in their own type."""
        if name == FINAL_NORM or name.endswith(_NORMS):
            return torch.ones_like(self.weights.read(name))
        if name == EMBEDDING:
            embedding = self.weights.read(name)
            return (embedding.float() @ self.hidden).to(embedding.dtype)
        if name == HEAD:
            weight = self.weights.read(EMBEDDING if self.config.tied else HEAD)
            return (self._gained(weight, FINAL_NORM) @ self.hidden).to(weight.dtype)
        layer, _, rest = name.partition(".self_attn." if ".self_attn." in name else ".mlp.")
        module, _, kind = rest.rpartition(".")
        tensor = self.weights.read(name)
        if kind == "bias":
            return self._bias(module, tensor)
        if tensor.ndim != 2:
            return tensor
        if module in _NORM_BEFORE:
            tensor = self._gained(tensor, f"{layer}.{_NORM_BEFORE[module]}.weight") @ self.hidden
            return self._by_head(tensor.t()).t() if module == "v_proj" else tensor
        return self.hidden.t() @ (self._by_head(tensor.float()) if module == "o_proj" else tensor.float())

    def _gained(self, weight_NK: Tensor, norm: str) -> Tensor:
        return weight_NK.float() * self.weights.read(norm).float()

    def _bias(self, module: str, bias_N: Tensor) -> Tensor:
        if module in ("o_proj", "down_proj"):
            return (bias_N.float() @ self.hidden).to(bias_N.dtype)
        return self._by_head(bias_N.float()[None])[0].to(bias_N.dtype) if module == "v_proj" else bias_N

    def _by_head(self, x_NX: Tensor) -> Tensor:
        """The last dimension, heads * head_dim, rotated within each head."""
        return (x_NX.reshape(len(x_NX), -1, self.config.head_dim) @ self.head).flatten(1)
