"""Reading weights from GGUF files by their Hugging Face names."""

from pathlib import Path

from torch import Tensor

from batchinfer.formats.gguf_numbers import dequantize
from batchinfer.formats.gguf_parts import GGUFParts
from batchinfer.host.files import Checksums
from batchinfer.models.config import ModelConfig
from batchinfer.models.gguf_config import ARCHITECTURES, Entries
from batchinfer.models.tensors import Matrix, Norm
from batchinfer.models.weights import refuse_not_finite


class GGUFWeights:
    """A `WeightSource` over a model's GGUF files, in order: every tensor is dequantized when it is read."""

    def __init__(self, files: list[Path], model: ModelConfig) -> None:
        self.file = GGUFParts(files)
        self.checksums = Checksums(files)
        self.stored = stored_modules(model)
        # Some architectures order the rows of q and k so that rotary embedding pairs neighbours; here it pairs halves.
        architecture = ARCHITECTURES[Entries.of(self.file).name]
        self.interleaved = _rotated(model) if architecture.interleaved else {}
        # GGUF files hold whole weights of norms, where Gemma's checkpoints hold their distance from 1.
        self.added = {f"{at}{norm.name}.weight": norm.added for at, norm in _norms(model)}
        kinds = sorted({tensor.type for tensor in self.file.tensors.values()} - {"F32"})
        self.stored_as = f"GGUF, {', '.join(kinds)}" if kinds else None
        # RoPE's divisors are in the config already.
        self.taken = {"rope_freqs.weight"}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor: float32 if it is quantized, else in its own floating-point type.

        Raises `ValueError` if it is missing or damaged, or has another shape.
        """
        stored = self.file.tensors.get(self._stored_name(name))
        if stored is None:
            raise ValueError(f"{self.file.path} has no tensor {self._stored_name(name)} (for {name})")
        self.taken.add(stored.name)
        if stored.shape != shape:
            raise ValueError(
                f"{self.file.path}: tensor {stored.name} has shape {list(stored.shape)}; its hyperparameters ask for "
                f"{list(shape)}"
            )
        tensor = dequantize(self.file.read(stored), stored.type, shape)
        refuse_not_finite(tensor, f"{self.file.path}: tensor {stored.name}")
        if added := self.added.get(name):
            tensor = tensor - added
        heads = self.interleaved.get(name.rpartition(".")[0])
        return tensor if heads is None else _halves(tensor, heads)

    def matrix(self, module: str, shape: tuple[int, int]) -> Tensor:
        """Return a module's weight [N, K]."""
        return self.take(f"{module}.weight", shape)

    def has_own_head(self, config: ModelConfig) -> bool:
        """Return False: the config was made from this file, and ties the head only if the file has none."""
        return False

    def drop(self, name: str) -> None:
        """Count a tensor as used without reading it; it may be missing."""
        self.taken.add(self._stored_name(name))

    def drop_all(self, beginning: str) -> None:
        """Count all tensors of a module as used; there may be none."""
        stored = self.stored.get(beginning.removesuffix("."))
        self.taken.update(name for name in self.file.tensors if stored and name.startswith(f"{stored}."))

    def _stored_name(self, name: str) -> str:
        if name in self.stored:  # a tensor by itself, which belongs to no module
            return f"{self.stored[name]}.weight"
        module, _, end = name.rpartition(".")
        return f"{self.stored[module]}.{end}"

    def finish(self) -> None:
        """Raise `ValueError` if a tensor was not used or the file's checksum is wrong."""
        self.checksums.check()
        if left := sorted(self.file.tensors.keys() - self.taken):
            raise ValueError(
                f"{self.file.path} has {len(left)} tensors that the model does not use: {', '.join(left[:5])}"
            )


def stored_modules(model: ModelConfig) -> dict[str, str]:
    """Return the name that GGUF files use for each module of a checkpoint."""
    names = {model.embedding.name: "token_embd", model.norm.name: "output_norm", model.head.name: "output"}
    if (made := model.ends.per_layer) is not None:
        names |= {made.table.name: "per_layer_token_embd", made.projection.name: "per_layer_model_proj"}
        names[made.norm.name] = "per_layer_proj_norm"
    for i, layer in enumerate(model.layers):
        a, f, p = layer.attention, layer.block, layer.per_layer
        modules: dict[str, Matrix | Norm | None] = {
            "attn_norm": layer.input_norm, "attn_q": a.q, "attn_v": a.v, "attn_k": a.k, "attn_output": a.output,
            "post_attention_norm": layer.attention_norm, "post_ffw_norm": layer.mlp_output_norm,
            "ffn_norm": layer.mlp_norm, "ffn_gate": f.gate, "ffn_up": f.up, "ffn_down": f.down,
        }  # fmt: skip
        if p is not None:
            modules |= {"inp_gate": p.gate, "proj": p.projection, "post_norm": p.norm}
        modules |= dict(zip(("attn_q_norm", "attn_k_norm"), a.head_norms or (), strict=False))
        found = {stored: module for stored, module in modules.items() if module is not None}
        # If the matrix of keys makes the values too, it is found twice; the name of keys comes last and is kept.
        names |= {f"{layer.prefix}{module.name}": f"blk.{i}.{stored}" for stored, module in found.items()}
        if layer.scalar is not None:
            names[f"{layer.prefix}{layer.scalar}"] = f"blk.{i}.layer_output_scale"
    return names


def _norms(model: ModelConfig) -> list[tuple[str, Norm]]:
    """Return all norms, with the beginning of their names."""
    return [("", model.norm), *((layer.prefix, norm) for layer in model.layers for norm in layer.norms)]


def _rotated(model: ModelConfig) -> dict[str, int]:
    """Return the modules to which rotary embedding applies (q and k of every layer), with their number of heads."""
    layers = [(layer.prefix, layer.attention) for layer in model.layers]
    return {f"{at}{m.name}": heads for at, a in layers for m, heads in ((a.q, a.heads), (a.k, a.kv_heads))}


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows [heads * d, ...] of each head: first the even ones, then the odd ones."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
