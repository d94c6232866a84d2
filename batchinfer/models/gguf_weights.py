"""Weights by their Hugging Face names from a GGUF file."""

from pathlib import Path

from torch import Tensor

from batchinfer.formats.gguf_file import GGUFFile
from batchinfer.formats.gguf_numbers import dequantize
from batchinfer.host.files import Checksums
from batchinfer.models.config import ModelConfig
from batchinfer.models.weights import refuse_not_finite

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


class GGUFWeights:
    """A `WeightSource`: every tensor is expanded to floating point as it is taken."""

    def __init__(self, path: Path, model: ModelConfig) -> None:
        self.file = GGUFFile(path)
        self.checksums = Checksums([path])
        self.model = model
        kinds = sorted({tensor.type for tensor in self.file.tensors.values()} - {"F32"})
        self.stored_as = f"GGUF, {', '.join(kinds)}" if kinds else None
        # The divisors of RoPE have become part of the config.
        self.taken = {"rope_freqs.weight"}
        # Files of this architecture hold queries and keys for rotation of neighbours instead of halves.
        self.interleaved = self.file.metadata.get("general.architecture") == "llama"

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor, float32 unless it is stored in another floating-point type."""
        stored = self.file.tensors.get(_stored_name(name))
        if stored is None:
            raise ValueError(f"{self.file.path} has no tensor {_stored_name(name)} (for {name})")
        self.taken.add(stored.name)
        if stored.shape != shape:
            raise ValueError(
                f"{self.file.path}: tensor {stored.name} has shape {list(stored.shape)}; its hyperparameters ask for "
                f"{list(shape)}"
            )
        tensor = dequantize(self.file.read(stored), stored.type, shape)
        refuse_not_finite(tensor, f"{self.file.path}: tensor {stored.name}")
        heads = {"q_proj": self.model.heads, "k_proj": self.model.kv_heads}.get(name.split(".")[-2])
        return tensor if heads is None or not self.interleaved else _halves(tensor, heads)

    def matrix(self, module: str, shape: tuple[int, int]) -> Tensor:
        """A module's weight [N, K]."""
        return self.take(f"{module}.weight", shape)

    def drop(self, name: str) -> None:
        """Count it as used, if it is there at all."""
        self.taken.add(_stored_name(name))

    def finish(self) -> None:
        """Every tensor must have been used, and the file's checksum be right."""
        self.checksums.check()
        if left := sorted(self.file.tensors.keys() - self.taken):
            raise ValueError(
                f"{self.file.path} has {len(left)} tensors that the model does not use: {', '.join(left[:5])}"
            )


def _stored_name(name: str) -> str:
    module, _, end = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{end}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest]}.{end}"


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * d, ...] with pairs of neighbours, to the first halves of all pairs before the second ones."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
