"""Reading weights from GGUF files."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from batchinfer.formats.gguf_file import StoredTensor
from batchinfer.formats.gguf_numbers import dequantize
from batchinfer.formats.gguf_parts import GGUFParts
from batchinfer.host.files import Checksums
from batchinfer.models.config import ModelConfig
from batchinfer.models.gguf_architectures import ARCHITECTURES
from batchinfer.models.gguf_config import entries_of
from batchinfer.models.gguf_layout import expert_tensor, in_gguf
from batchinfer.models.gguf_rope import TENSORS as ROPE
from batchinfer.models.mixer import GatedDeltaNet
from batchinfer.models.weights import refuse_not_finite

Change = Callable[[Tensor], Tensor]


class GGUFWeights:
    """A `WeightSource` over a model's GGUF files, in order: every tensor is dequantized when it is read.

    `model` is the config with the names and forms that tensors have in these files, by which they are read.
    """

    def __init__(self, files: list[Path], model: ModelConfig) -> None:
        self.file = GGUFParts(files)
        self.checksums = Checksums(files)
        entries = entries_of(self.file)
        architecture = ARCHITECTURES[entries.name]
        self.model = in_gguf(model, self.file.tensors, architecture.interleaved)
        self.changes = _changes(self.model, architecture.tiled)
        kinds = sorted({tensor.type for tensor in self.file.tensors.values()} - {"F32"})
        self.stored_as = f"GGUF, {', '.join(kinds)}" if kinds else None
        self.taken = set(ROPE)  # they are in the config already
        self._experts: dict[str, int] = {}  # tensor of all experts -> number of those that were taken
        for i in range(entries.layers, entries.all_layers):
            self.drop_all(f"blk.{i}.")

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor, or that of one expert: float32 if it is quantized, else in its own floating-point type.

        Raises `ValueError` if it is missing or damaged, or has another shape.
        """
        expert = expert_tensor(name)
        stored = self._stored(name if expert is None else expert[0])
        self.taken.add(stored.name)
        found = stored.shape if expert is None else stored.shape[1:]
        # A dimension of 1 is stored in some files and left out in others.
        if [n for n in found if n != 1] != [n for n in shape if n != 1]:
            of = "" if expert is None else " for each expert"
            raise ValueError(
                f"{self.file.path}: tensor {stored.name} has shape {list(found)}{of}; its hyperparameters ask for "
                f"{list(shape)}"
            )
        data = self.file.read(stored)
        if expert is not None:
            count, number = stored.shape[0], expert[1]
            if number >= count:
                raise ValueError(
                    f"{self.file.path}: tensor {stored.name} holds {count} experts; expert_count is larger"
                )
            self._experts[stored.name] = max(self._experts.get(stored.name, 0), number + 1)
            data = data.reshape(count, -1)[number]
        tensor = dequantize(data, stored.type, shape)
        refuse_not_finite(tensor, f"{self.file.path}: tensor {stored.name}")
        return self.changes[name](tensor) if name in self.changes else tensor

    def _stored(self, name: str) -> StoredTensor:
        if name not in self.file.tensors:
            raise ValueError(f"{self.file.path} has no tensor {name}")
        return self.file.tensors[name]

    def matrix(self, module: str, shape: tuple[int, int]) -> Tensor:
        """Return a module's weight [N, K]."""
        return self.take(f"{module}.weight", shape)

    def drop(self, name: str) -> None:
        """Count a tensor as used without reading it; it may be missing."""
        self.taken.add(name)

    def drop_all(self, beginning: str) -> None:
        """Count all tensors whose names begin like this as used; there may be none."""
        self.taken.update(name for name in self.file.tensors if name.startswith(beginning))

    def finish(self) -> None:
        """Raise `ValueError` if a tensor was not used or the file's checksum is wrong."""
        self.checksums.check()
        for name, experts in self._experts.items():
            if (held := self.file.tensors[name].shape[0]) != experts:
                raise ValueError(f"{self.file.path}: tensor {name} holds {held} experts; expert_count is {experts}")
        if left := sorted(self.file.tensors.keys() - self.taken):
            raise ValueError(
                f"{self.file.path} has {len(left)} tensors that the model does not use: {', '.join(left[:5])}"
            )


def _changes(model: ModelConfig, tiled: bool) -> dict[str, Change]:
    """Return by name what makes the numbers that the description means of those in the file."""
    found: dict[str, Change] = {}
    norms = [("", model.norm), *((layer.prefix, norm) for layer in model.layers for norm in layer.norms)]
    for at, norm in norms:
        if norm.added:  # files hold whole weights
            found[f"{at}{norm.name}.weight"] = _less(norm.added)
    for layer in model.layers:
        if isinstance(layer.mixer, GatedDeltaNet):
            changes = _delta_net_changes(layer.mixer, tiled)
            found |= {f"{layer.prefix}{name}": change for name, change in changes.items()}
    return found


def _less(number: float) -> Change:
    return lambda x: x - number


def _in_order(rows: Tensor) -> Change:
    return lambda x: x[rows]


def _delta_net_changes(mixer: GatedDeltaNet, tiled: bool) -> dict[str, Change]:
    """Return the changes of a DeltaNet's tensors.

    Files hold the decay's factor, not its logarithm. If they are `tiled`, head i of the values belongs to head
    i % key_heads of the keys, so that heads are reordered here wherever values come in or go out.
    """

    def logarithm(factor: Tensor) -> Tensor:
        return (-factor).log()

    if not tiled:
        return {"ssm_a": logarithm}
    shared = mixer.heads // mixer.key_heads
    heads = torch.arange(mixer.heads).view(shared, mixer.key_heads).t().flatten()
    values = (heads[:, None] * mixer.value_dim + torch.arange(mixer.value_dim)).flatten()
    keys = 2 * mixer.key_heads * mixer.key_dim
    channels = torch.cat([torch.arange(keys), keys + values])
    by_head = ("ssm_beta.weight", "ssm_alpha.weight", "ssm_dt.bias")
    orders = {"attn_qkv.weight": channels, "ssm_conv1d.weight": channels, "attn_gate.weight": values}
    orders |= dict.fromkeys(by_head, heads)
    changes = {name: _in_order(order) for name, order in orders.items()}
    return changes | {"ssm_a": lambda x: logarithm(x[heads]), "ssm_out.weight": lambda x: x[:, values]}
