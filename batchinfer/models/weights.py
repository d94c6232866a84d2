"""Reading weights by name, one tensor at a time: from safetensors files, or random ones for measuring speed."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from batchinfer.formats.matrix import QuantizedMatrix
from batchinfer.formats.registry import Format
from batchinfer.host.files import Checksums, read_object, refuse_pointer
from batchinfer.models.config import ModelConfig
from batchinfer.models.fused_experts import QWEN_3_5, ExpertPart
from batchinfer.models.wrappers import Prefixes

ROWS = 1024  # of a matrix, compared at a time
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class WeightSource(Protocol):
    """A model's tensors, as the loader reads them."""

    stored_as: str | None  # name of the format of quantized weights, for the report

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a floating-point tensor. Raises `ValueError` if it is missing or has another shape."""
        ...

    def matrix(self, module: str, shape: tuple[int, int]) -> Tensor | QuantizedMatrix:
        """Return a module's weight [N, K], quantized if it is stored so."""
        ...

    def drop(self, name: str) -> None:
        """Count a tensor as used without reading it."""
        ...

    def drop_all(self, beginning: str) -> None:
        """Count all tensors whose names begin like this as used without reading them; there may be none."""
        ...

    def finish(self) -> None:
        """Raise `ValueError` if a tensor was not used or a file's checksum is wrong."""
        ...


def with_stored_head(config: ModelConfig, weights: "SafetensorsWeights") -> ModelConfig:
    """Return the config with the head that is stored: the tensors decide, whatever `tie_word_embeddings` says."""
    if not config.tied or not weights.has_own_head(config):
        return config
    head, embedding = f"{config.head.name}.weight", f"{config.embedding.name}.weight"
    note = f"tie_word_embeddings is true, but {head} is stored and differs from {embedding}: the stored one is used"
    # A wrapper and the model inside may say different things, so nobody is surprised there.
    return replace(config, tied=False, notes=config.notes if config.wrapped else (*config.notes, note))


class SafetensorsWeights:
    """The `*.safetensors` files of a checkpoint's folder, in one file or in shards.

    `config` says in which format matrices are quantized, whether the checkpoint holds more than a language model, which
    tensors are not needed, and how experts may be fused. Without one, tensors are in floating point and have the names
    that files give them. All tensors are found by the names that layers describe, whatever the files call them.
    """

    def __init__(self, model: Path, config: ModelConfig | None = None) -> None:
        self.form = None if config is None else config.form
        self.stored_as = None if self.form is None else self.form.name
        self.files = _locate(model)
        self.prefixes = Prefixes.of(self.files) if config is not None and config.wrapped else Prefixes()
        self.left_aside = self.prefixes.beside + (() if config is None else config.ends.left_aside)
        self.fused = QWEN_3_5 if config is None else config.fused_experts
        self.checksums = Checksums(self.files.values())
        self.taken: set[str] = set()
        self._experts: dict[str, int] = {}  # tensor of all experts -> number of those that were taken

    def drop(self, name: str) -> None:
        """Count a tensor as used without reading it; it may be missing."""
        self.taken.add(self.prefixes.stored(name))

    def drop_all(self, beginning: str) -> None:
        """Count all tensors whose names begin like this as used; there may be none."""
        stored = self.prefixes.stored(beginning)
        self.taken.update(name for name in self.files if name.startswith(stored))

    def names(self) -> list[str]:
        """Return the names of the language model's tensors, sorted; those of each expert where experts are fused."""
        own = (name for name in self.files if not name.startswith(self.prefixes.beside))
        return sorted(self.prefixes.plain(part) for name in own for part in self._parts(name))

    def read(self, name: str) -> Tensor:
        """Return a floating-point tensor of any shape."""
        return self.take(name, self.shape(name))

    def has(self, name: str) -> bool:
        """Return whether there is a tensor of this name."""
        name = self.prefixes.stored(name)
        return name in self.files or self.fused.part(name, self.files) is not None

    def has_own_head(self, config: ModelConfig) -> bool:
        """Return whether the tensors hold a head, and it is another matrix than the embedding.

        They are compared a slice at a time.
        """
        modules = (config.head.name, config.embedding.name)
        head, embedding = (self.prefixes.stored(f"{module}.weight") for module in modules)
        if not self.has(head) or not self.has(embedding):
            return False
        with safe_open(self._file(head), "pt") as left, safe_open(self._file(embedding), "pt") as right:
            ours, theirs = left.get_slice(head), right.get_slice(embedding)
            shape = [config.vocab_size, config.hidden_size]
            if ours.get_shape() != shape or theirs.get_shape() != shape or ours.get_dtype() != theirs.get_dtype():
                return True
            pieces = (slice(i, i + ROWS) for i in range(0, config.vocab_size, ROWS))
            return not all(ours[piece].view(torch.uint8).equal(theirs[piece].view(torch.uint8)) for piece in pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape from the file's header. Raises `ValueError` if it is missing."""
        stored, part = self._place(name)
        with safe_open(self._file(stored), "pt") as file:
            shape = file.get_slice(stored).get_shape()
        if part is None:
            return tuple(shape)
        try:
            return tuple(part.of(torch.empty(shape, device="meta")[part.expert]).shape)
        except (IndexError, RuntimeError):
            raise ValueError(f"tensor {stored} has shape {shape}, in which there is no {name}") from None

    def matrix(self, module: str, shape: tuple[int, int]) -> Tensor | QuantizedMatrix:
        """Return a module's weight [N, K], quantized if it is stored so, else in floating point."""
        module = self.prefixes.stored(f"{module}.").removesuffix(".")
        stored = None if self.form is None else self.form.matrix(module, shape, self)
        return self.take(f"{module}.weight", shape) if stored is None else stored

    def _place(self, name: str) -> tuple[str, ExpertPart | None]:
        """Return the name in the file of a tensor, or that of the fused experts that it is a part of, and the part."""
        name = self.prefixes.stored(name)
        part = self.fused.part(name, self.files)
        return (name, None) if part is None else (part.tensor, part)

    def _parts(self, name: str) -> list[str]:
        """Return the names of the tensors that a tensor of the files holds."""
        if not (around := self.fused.around(name)):
            return [name]
        return [f"{before}{i}{behind}" for i in range(*self.shape(name)[:1] or (0,)) for before, behind in around]

    def _file(self, name: str) -> Path:
        if name not in self.files:
            raise ValueError(f"the checkpoint has no tensor {name}")
        return self.files[name]

    def take(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """Return a copy of the tensor. The file is mapped only during this call, so its pages do not stay resident.

        Raises `ValueError` if the tensor is missing or damaged, or has another shape or none of these types (by
        default, any floating-point type).
        """
        stored, part = self._place(name)
        path = self._file(stored)
        self.taken.add(stored)
        try:
            with safe_open(path, "pt") as file:
                if part is None:
                    tensor: Tensor = file.get_tensor(stored).clone()
                else:
                    self._experts[stored] = max(self._experts.get(stored, 0), part.expert + 1)
                    tensor = part.of(file.get_slice(stored)[part.expert]).clone(memory_format=torch.contiguous_format)
        except (SafetensorError, OSError, IndexError, RuntimeError) as error:
            raise ValueError(f"{path}: tensor {name} cannot be read: {str(error)[:300]}") from None
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{path}: tensor {name} has shape {list(tensor.shape)}; config.json asks for {list(shape)}"
            )
        if tensor.dtype not in (dtypes or FLOATS):
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) or "floating point"
            raise ValueError(
                f"{path}: tensor {name} is {str(tensor.dtype).removeprefix('torch.')}; expected {expected}"
            )
        refuse_not_finite(tensor, f"{path}: tensor {name}")
        return tensor

    def finish(self) -> None:
        """Raise `ValueError` if a checksum is wrong, or if a tensor was not used: the config may not fit the model."""
        self.checksums.check()
        for name, experts in self._experts.items():
            if (held := self.shape(name)[0]) != experts:
                raise ValueError(f"tensor {name} holds {held} experts; config.json asks for {experts}")
        # Older checkpoints contain the rotary frequencies, which follow from config.json.
        left = {n for n in self.files.keys() - self.taken if not n.endswith("rotary_emb.inv_freq")}
        left = {name for name in left if not name.startswith(self.left_aside)}
        if left:
            names = ", ".join(sorted(left)[:5])
            raise ValueError(f"the checkpoint has {len(left)} tensors that the model does not use: {names}")


def refuse_not_finite(tensor: Tensor, name: str) -> None:
    """Raise `ValueError` if the tensor contains NaN or infinity. This takes one pass over a sound tensor."""
    if tensor.dtype == torch.float8_e4m3fn:  # the type has no infinity, and torch cannot sum it
        bad = (tensor.view(torch.uint8) & 0x7F == 0x7F).sum()
    elif not tensor.is_floating_point() or bool(tensor.sum().isfinite()):
        return
    else:
        bad = (~tensor.isfinite()).sum()  # the sum above may have overflowed although all its terms are finite
    if bad:
        raise ValueError(
            f"{name} holds {bad} of {tensor.numel()} numbers that are NaN or infinite: the checkpoint is damaged; "
            "fetch it again, or take an earlier one of its training"
        )


NOISE = 0.02  # standard deviation of random weights
QUANTIZED_NOISE = 4.6  # standard deviation of uniform integers from -8 to 7
EXPONENT = -8  # of scales that are powers of two: near NOISE / QUANTIZED_NOISE


class RandomWeights:
    """Random weights in a model's shapes, N(0, 0.02), for measuring speed without a checkpoint.

    They are the same in every run, and are made on the device. Matrices are quantized if `form` is given.
    """

    stored_as: str | None = None

    def __init__(self, dtype: torch.dtype, device: torch.device, form: Format | None) -> None:
        self.dtype, self.device, self.form = dtype, device, form
        self.generator = torch.Generator(device).manual_seed(0)

    def has(self, name: str) -> bool:
        """Return False: the tensors that a format asks about are all optional."""
        return False

    def shape(self, name: str) -> tuple[int, ...]:
        """Return (): a format that asks for a stored shape gets a scalar."""
        return ()

    def drop(self, name: str) -> None:
        """Do nothing."""

    def drop_all(self, beginning: str) -> None:
        """Do nothing."""

    def take(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """Return ones for norms and scalars, one constant for all scales, and noise for other tensors."""
        if len(shape) == 1 and ("norm" in name or name.endswith("scalar")):
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        if name.endswith("weight_shape"):
            return torch.tensor(self._asked)
        if name.endswith("scale") and torch.uint8 in dtypes:  # exponents of powers of two
            return torch.full(shape, 127 + EXPONENT, dtype=torch.uint8, device=self.device)
        if name.endswith("global_scale"):
            return torch.ones(shape, device=self.device)
        if name.endswith(("scale", "scale_inv")):
            return torch.full(shape, NOISE / QUANTIZED_NOISE, device=self.device)
        if torch.int32 in dtypes:  # packed numbers: every int32 is a valid word
            words = torch.empty(shape, dtype=torch.int32, device=self.device)
            return words.random_(-(1 << 31), 1 << 31, generator=self.generator)
        if torch.uint8 in dtypes:
            octets = torch.empty(shape, dtype=torch.uint8, device=self.device)
            return octets.random_(0, 1 << 8, generator=self.generator)
        noise = torch.empty(shape, device=self.device)
        if dtypes:  # numbers of 4 bits, which every type holds
            return noise.random_(-8, 8, generator=self.generator).to(dtypes[0])
        return noise.normal_(0, NOISE, generator=self.generator).to(self.dtype)

    def matrix(self, module: str, shape: tuple[int, int]) -> Tensor | QuantizedMatrix:
        """Return a random weight [N, K], quantized if there is a format."""
        self._asked = shape
        quantized = None if self.form is None else self.form.matrix(module, shape, self)
        return self.take(f"{module}.weight", shape) if quantized is None else quantized

    def finish(self) -> None:
        """Do nothing: no tensor can be left over."""


def _locate(model: Path) -> dict[str, Path]:
    """Return the file of each tensor name.

    Raises `ValueError` if files are missing or damaged, or if two files, or the index and a file, contradict each
    other.
    """
    index = model / "model.safetensors.index.json"
    claimed = _claimed(index) if index.exists() else None
    if (single := model / "model.safetensors").is_file() and _decides(single, claimed):
        claimed, paths = None, [single]
    else:
        paths = sorted(model.glob("*.safetensors") if claimed is None else set(claimed.values()))
    if not paths:
        raise ValueError(
            f"{model} has no *.safetensors; other weight files (pickles) are never read: save the model anew with "
            "save_pretrained of transformers, or take a checkpoint that has them"
        )
    found: dict[str, Path] = {}
    for path in paths:
        for name in tensor_names(path):
            if name in found:
                raise ValueError(f"tensor {name} is in {found[name].name} and in {path.name}")
            found[name] = path
    if claimed is not None and claimed != found:
        wrong = sorted(set(claimed.items()) ^ set(found.items()))[0]
        raise ValueError(f"{index} and the files beside it disagree about tensor {wrong[0]}")
    return found


def _decides(single: Path, claimed: dict[str, Path] | None) -> bool:
    """Return whether all weights are in `model.safetensors`, as they are unless an index names it among its files.

    Raises `ValueError` if the files of the index are there too. transformers would read the one file, vLLM the others.
    """
    files = set() if claimed is None else set(claimed.values())
    if single in files:
        return False
    if there := sorted(file.name for file in files if file.is_file()):
        raise ValueError(
            f"{single.parent} holds two sets of weights: model.safetensors, and {there[0]} with what else "
            "model.safetensors.index.json names; delete the set that is out of date"
        )
    return True


def _claimed(index: Path) -> dict[str, Path]:
    """Return the file of each tensor name from the index, which may name files beside it but no paths."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{index} is not an index of weights: it has no object weight_map")
    for file in names.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index} names {ascii(file)[:60]}, which is not a *.safetensors file beside it")
    return {name: index.parent / file for name, file in names.items()}


def tensor_names(path: Path) -> list[str]:
    """Return the names of the tensors in a file. Raises `ValueError` if it is not a safetensors file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    refuse_pointer(path)
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged, or not a safetensors file: {str(error)[:300]}; fetch it again") from None
    _refuse_doubles(path)
    return names


def _refuse_doubles(path: Path) -> None:
    """Raise `ValueError` if the header has a name twice. The library would silently take the last entry."""

    def refuse(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        name, count = Counter(key for key, _ in pairs).most_common(1)[0] if pairs else ("", 1)
        if count > 1:
            raise ValueError(f"{path} is damaged: its header has {count} entries {name}")
        return dict(pairs)

    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    json.loads(header, object_pairs_hook=refuse)
