"""Weights by name from safetensors files, one tensor at a time, each file's pages let go at once."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from batchinfer.formats.matrix import QuantizedMatrix
from batchinfer.formats.registry import Format
from batchinfer.host.files import Checksums, read_object, refuse_pointer

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class WeightSource(Protocol):
    """Where a model's tensors come from."""

    stored_as: str | None  # a format of few bits, for the report

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The floating-point tensor of this name; a `ValueError` if it is missing or has another shape."""
        ...

    def matrix(self, module: str, shape: tuple[int, int]) -> Tensor | QuantizedMatrix:
        """A module's weight [N, K], as it is stored."""
        ...

    def drop(self, name: str) -> None:
        """Count a tensor as used that need not be read."""
        ...

    def finish(self) -> None:
        """A `ValueError` names tensors that nobody took, or a file whose checksum is wrong."""
        ...


class SafetensorsWeights:
    """The `*.safetensors` of a checkpoint folder, sharded or not; `form` is how its matrices are quantized, if so."""

    def __init__(self, model: Path, form: Format | None = None) -> None:
        self.form = form
        self.stored_as = None if form is None else form.name
        self.files = _locate(model)
        self.checksums = Checksums(self.files.values())
        self.taken: set[str] = set()

    def drop(self, name: str) -> None:
        """Count it as used, if it is there at all."""
        self.taken.add(name)

    def names(self) -> list[str]:
        """Of all tensors."""
        return sorted(self.files)

    def read(self, name: str) -> Tensor:
        """A floating-point tensor of whatever shape."""
        return self.take(name, self.shape(name))

    def has(self, name: str) -> bool:
        """True if there is a tensor of this name."""
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, from the file's header."""
        with safe_open(self._file(name), "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def matrix(self, module: str, shape: tuple[int, int]) -> Tensor | QuantizedMatrix:
        """A module's weight [N, K], in the checkpoint's format or in floating point."""
        stored = None if self.form is None else self.form.matrix(module, shape, self)
        return self.take(f"{module}.weight", shape) if stored is None else stored

    def _file(self, name: str) -> Path:
        if name not in self.files:
            raise ValueError(f"the checkpoint has no tensor {name}")
        return self.files[name]

    def take(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """A copy of the tensor. The file is mapped for this one call, so that its pages do not stay resident."""
        path = self._file(name)
        self.taken.add(name)
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
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
        """Every tensor must have been used: one left over means that the model was understood wrongly."""
        self.checksums.check()
        # Older exports carry the rotary table, which follows from config.json.
        left = {n for n in self.files.keys() - self.taken if not n.endswith("rotary_emb.inv_freq")}
        if left:
            names = ", ".join(sorted(left)[:5])
            raise ValueError(f"the checkpoint has {len(left)} tensors that the model does not use: {names}")


def refuse_not_finite(tensor: Tensor, name: str) -> None:
    """A `ValueError` where a number in it is NaN or infinite, which one pass over it tells."""
    if tensor.dtype == torch.float8_e4m3fn:  # has no infinity, and torch no sum of it
        bad = (tensor.view(torch.uint8) & 0x7F == 0x7F).sum()
    elif not tensor.is_floating_point() or bool(tensor.sum().isfinite()):
        return
    else:
        bad = (~tensor.isfinite()).sum()  # a sum may overflow though its terms are finite
    if bad:
        raise ValueError(
            f"{name} holds {bad} of {tensor.numel()} numbers that are NaN or infinite: the checkpoint is damaged; "
            "fetch it again, or take an earlier one of its training"
        )


NOISE = 0.02
QUANTIZED_NOISE = 4.6  # of whole numbers from -8 to 7, all alike


class RandomWeights:
    """Noise in the shape of a model, N(0, 0.02), the same at every run: for measuring speed without a checkpoint.

    Matrices are in few bits where `form` says so. They are made on the device.
    """

    stored_as: str | None = None

    def __init__(self, dtype: torch.dtype, device: torch.device, form: Format | None) -> None:
        self.dtype, self.device, self.form = dtype, device, form
        self.generator = torch.Generator(device).manual_seed(0)

    def has(self, name: str) -> bool:
        """Nothing that a format can do without."""
        return False

    def shape(self, name: str) -> tuple[int, ...]:
        """One number for a tensor."""
        return ()

    def drop(self, name: str) -> None:
        """Nothing to do."""

    def take(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """Ones for norms, one scale for all, noise for the rest."""
        if len(shape) == 1 and "norm" in name:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        if name.endswith("weight_shape"):
            return torch.tensor(self._asked)
        if name.endswith("scale"):
            return torch.full(shape, NOISE / QUANTIZED_NOISE, device=self.device)
        if torch.int32 in dtypes:  # packed: every word is one of numbers in few bits
            words = torch.empty(shape, dtype=torch.int32, device=self.device)
            return words.random_(-(1 << 31), 1 << 31, generator=self.generator)
        noise = torch.empty(shape, device=self.device)
        noise.normal_(0, QUANTIZED_NOISE if dtypes else NOISE, generator=self.generator)
        return noise.to(dtypes[0] if dtypes else self.dtype)

    def matrix(self, module: str, shape: tuple[int, int]) -> Tensor | QuantizedMatrix:
        """Noise, as the format has it."""
        self._asked = shape
        quantized = None if self.form is None else self.form.matrix(module, shape, self)
        return self.take(f"{module}.weight", shape) if quantized is None else quantized

    def finish(self) -> None:
        """Nothing can be left over."""


def _locate(model: Path) -> dict[str, Path]:
    """Tensor name to file. A `ValueError` names what is missing, doubled or not what it seems."""
    index = model / "model.safetensors.index.json"
    claimed = _claimed(index) if index.exists() else None
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


def _claimed(index: Path) -> dict[str, Path]:
    """Tensor name to file, as the index has it: names of files beside it, never paths."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{index} is not an index of weights: it has no object weight_map")
    for file in names.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index} names {ascii(file)[:60]}, which is not a *.safetensors file beside it")
    return {name: index.parent / file for name, file in names.items()}


def tensor_names(path: Path) -> list[str]:
    """What is in a file. A `ValueError` names the file if it is not one of safetensors."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    refuse_pointer(path)
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {str(error)[:300]}; fetch it again") from None
    _refuse_doubles(path)
    return names


def _refuse_doubles(path: Path) -> None:
    """The library lets the last of several entries win; which one was meant nobody knows."""

    def refuse(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        name, count = Counter(key for key, _ in pairs).most_common(1)[0] if pairs else ("", 1)
        if count > 1:
            raise ValueError(f"{path} is damaged: its header has {count} entries {name}")
        return dict(pairs)

    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    json.loads(header, object_pairs_hook=refuse)
