"""A checkpoint walked layer by layer: read, quantize, write; one layer in memory at a time.

Each layer goes into a file of its own, put there by rename. So a run that was interrupted goes on at the layer where it
stopped, and what the output holds is always whole.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from batchinfer.model_config import read_model_config
from batchinfer.quantize.matrix import QuantizedMatrix
from batchinfer.quantize.scheme import WeightScheme
from batchinfer.quantize.writer import quantization_config, stored_tensors
from batchinfer.weights import SafetensorsWeights, tensor_names

Method = Callable[[Tensor, WeightScheme], QuantizedMatrix]

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_COPIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "*.jinja", "vocab*", "merges.txt")
STATE = "quantize.json"


@dataclass(frozen=True)
class LayerReport:
    """What a layer lost: the relative error of its matrices' weights, by module."""

    layer: int
    errors: dict[str, float]
    resumed: bool


class Quantizer:
    """`run()` walks a checkpoint's layers and leaves a quantized one in `output`.

    A `ValueError` says what is wrong with the checkpoint, or that `output` holds something else.
    """

    def __init__(self, model: Path, output: Path, scheme: WeightScheme, method: str, quantize: Method) -> None:
        self.config = read_model_config(model)
        if self.config.form is not None:
            raise ValueError(f"{model} is quantized already ({self.config.form.name}); take its floating-point one")
        c = self.config
        for field, columns in (("hidden_size", c.hidden_size), ("intermediate_size", c.intermediate_size)):
            if scheme.group_size and columns % scheme.group_size:
                raise ValueError(
                    f"--group-size {scheme.group_size} does not divide {field} {columns}; take a smaller one, or 0"
                )
        self.model, self.output, self.scheme, self.quantize = model, output, scheme, quantize
        self.weights = SafetensorsWeights(model)
        stamp = {"scheme": asdict(scheme), "method": method, "model": _fingerprint(model)}
        self._begin(json.loads(json.dumps(stamp)))

    @property
    def steps(self) -> int:
        """Files to write: one a layer, and one for what lies outside the layers."""
        return self.config.layers + 1

    def run(self) -> Iterator[LayerReport]:
        """Quantize layer by layer; what is there already is only counted."""
        names: dict[int, list[str]] = {i: [] for i in range(-1, self.config.layers)}
        for name in sorted(self.weights.files):
            found = _LAYER.match(name)
            layer = int(found[1]) if found else -1
            if layer not in names:
                raise ValueError(f"tensor {name} belongs to a layer beyond num_hidden_layers {self.config.layers}")
            names[layer].append(name)
        for layer, group in names.items():
            yield self._layer(layer, group)
        self._finish()

    def _layer(self, layer: int, names: list[str]) -> LayerReport:
        path = self.output / self._file(layer)
        if path.exists():
            return LayerReport(layer, self.state["errors"][str(layer)], resumed=True)
        tensors: dict[str, Tensor] = {}
        errors: dict[str, float] = {}
        for name in names:
            tensor = self.weights.take(name, self.weights.shape(name))
            module = name.removesuffix(".weight")
            if layer < 0 or tensor.ndim != 2:
                tensors[name] = tensor
                continue
            try:
                matrix = self.quantize(tensor, self.scheme)
            except ValueError as error:
                raise ValueError(f"tensor {name}: {error}") from None
            errors[module] = _relative_error(tensor, matrix)
            tensors |= {f"{module}.{part}": value for part, value in stored_tensors(matrix, tensor.dtype).items()}
        self.state["errors"][str(layer)] = errors
        self._write_state()
        unfinished = path.with_suffix(".unfinished")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, {"format": "pt"})
        unfinished.replace(path)
        return LayerReport(layer, errors, resumed=False)

    def _file(self, layer: int) -> str:
        return f"model-{layer + 2:05}-of-{self.steps:05}.safetensors"

    def _begin(self, stamp: dict[str, Any]) -> None:
        self.state: dict[str, Any] = {"stamp": stamp, "errors": {}}
        path = self.output / STATE
        if path.exists():
            self.state = json.loads(path.read_text())
            if self.state["stamp"] != stamp:
                raise ValueError(f"{self.output} was begun with another model, scheme or method; take another folder")
        elif self.output.exists() and any(self.output.iterdir()):
            raise ValueError(f"{self.output} is not empty; take another folder")
        self.output.mkdir(parents=True, exist_ok=True)
        self._write_state()

    def _write_state(self) -> None:
        """Whole or not at all; a layer's errors are in it before the layer's file is there."""
        unfinished = self.output / f"{STATE}.unfinished"
        unfinished.write_text(json.dumps(self.state))
        unfinished.replace(self.output / STATE)

    def _finish(self) -> None:
        """The files beside the weights; config.json last, for with it the folder is a checkpoint."""
        weight_map: dict[str, str] = {}
        size = 0
        for layer in range(-1, self.config.layers):
            path = self.output / self._file(layer)
            weight_map |= dict.fromkeys(tensor_names(path), path.name)
            size += path.stat().st_size
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (self.output / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for pattern in _COPIED:
            for source in self.model.glob(pattern):
                shutil.copyfile(source, self.output / source.name)
        config = json.loads((self.model / "config.json").read_text())
        config["quantization_config"] = quantization_config(self.scheme, ["lm_head"])
        (self.output / "config.json").write_text(json.dumps(config, indent=2))
        (self.output / STATE).unlink()


def _relative_error(weight: Tensor, matrix: QuantizedMatrix) -> float:
    difference = matrix.dequantize().sub_(weight.float())
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(weight.float()).clamp(min=1e-30))


def _fingerprint(model: Path) -> str:
    """Of the files' names and sizes and the config: another checkpoint would differ in one of them."""
    files = [(path.name, path.stat().st_size) for path in sorted(model.glob("*.safetensors"))]
    digest = hashlib.sha256(json.dumps(files).encode())
    digest.update((model / "config.json").read_bytes())
    return digest.hexdigest()
