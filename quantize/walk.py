"""`Quantizer`: reads, quantizes and writes a checkpoint layer by layer, with one layer in memory at a time.

Each layer is written to a file of its own, which gets its final name when it is complete. So an interrupted run resumes
at the layer where it stopped.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from errno import EIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from batchinfer import __version__
from batchinfer.formats.compressed_tensors_writer import quantization_config, stored_tensors
from batchinfer.formats.matrix import QuantizedMatrix
from batchinfer.formats.mxfp4 import MXFP4
from batchinfer.formats.scheme import WeightScheme
from batchinfer.host.files import write_checksums
from batchinfer.models.config import language_model_fields, read_model_config
from batchinfer.models.feed_forward import Experts
from batchinfer.models.weights import SafetensorsWeights, tensor_names, with_stored_head
from batchinfer.quantize.channel_scales import channel_makers, scale_channels
from batchinfer.quantize.expanded_weights import ExpandedWeights, NamedWeights
from batchinfer.quantize.inputs import Inputs
from batchinfer.quantize.layer_inputs import ROUTER, Calibration
from batchinfer.quantize.methods import Method
from batchinfer.quantize.rotated_weights import RotatedWeights

_COPIED = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.jinja", "additional_chat_templates/*.jinja", "chat_template.json",
)  # fmt: skip
_CALIBRATION = "calibration"
STATE = "quantize.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float32, "float32": torch.float32}
"""The type in which calibration computes, by the checkpoint's type. CPUs have no float16 arithmetic."""


@dataclass(frozen=True)
class LayerReport:
    """The errors of a quantized layer by module.

    They are relative errors: of the products with the calibration's inputs, or of the weights without calibration.
    """

    layer: int
    errors: dict[str, float]
    notes: list[str]
    resumed: bool


_Quantized = tuple[str, QuantizedMatrix, float, list[str]]
"""(module's name within its layer, its matrix, its error, remarks for the report)."""


class Quantizer:
    """Makes a quantized checkpoint in `output`: `run()` writes its layers, then `finish()` its other files.

    `sequences` of token ids are needed by calibrated methods. If `rotation`, a random seed, is given, hidden states and
    values are rotated first. Raises `ValueError` if the checkpoint is not suitable or `output` holds something else.
    """

    def __init__(
        self,
        model: Path,
        output: Path,
        scheme: WeightScheme,
        method: Method,
        sequences: list[NDArray[np.int32]] | None = None,
        rotation: int | None = None,
    ) -> None:
        named = read_model_config(model)
        if named.form is not None and not isinstance(named.form, MXFP4):
            raise ValueError(f"{model} is quantized already ({named.form.name}); take its floating-point one")
        for layer in named.layers:
            for matrix in layer.matrices:
                if scheme.group_size and matrix.columns % scheme.group_size:
                    raise ValueError(
                        f"--group-size {scheme.group_size} does not divide the {matrix.columns} columns of "
                        f"{layer.prefix}{matrix.name}; take a smaller one, or 0"
                    )
            if method.scaled:
                channel_makers(layer)
        if named.dtype not in DTYPES:
            raise ValueError(f"{model}: dtype is {named.dtype!r}; it must be one of {', '.join(DTYPES)}")
        self.model, self.output, self.method = model, output, method
        self.scheme = replace(scheme, scale_type=named.dtype)
        stored = SafetensorsWeights(model, named)
        self.checksums = stored.checksums
        self.config = c = with_stored_head(named, stored)
        weights = stored if named.form is None else ExpandedWeights(stored, getattr(torch, c.dtype))
        self.weights = weights if rotation is None else RotatedWeights(weights, c, rotation)
        self.untied = named.tied and (rotation is not None or not c.tied)
        self._check(weights, sequences)
        stamp = {
            "batchinfer": __version__,
            "model": _fingerprint(model),
            "scheme": asdict(self.scheme),
            "method": method.name,
            "rotation": rotation,
            "calibration": sequences and _digest(sequences),
        }
        self.output.mkdir(parents=True, exist_ok=True)
        self._lock()
        try:
            self._begin(json.loads(json.dumps(stamp)))
        except ValueError:
            self._unlock()
            raise
        self.calibration: Calibration | None = None
        if method.calibrated:
            assert sequences, "a calibrated method needs sequences"
            (output / _CALIBRATION).mkdir(exist_ok=True)
            self.calibration = Calibration(c, sequences, DTYPES[c.dtype], output / _CALIBRATION)

    @property
    def files(self) -> int:
        """Number of files to write: one per layer, and one for the tensors outside the layers."""
        return len(self.config.layers) + 1

    @torch.inference_mode()
    def run(self) -> Iterator[LayerReport]:
        """Quantize and write layer by layer. A layer whose file exists is only reported. Call `finish()` afterwards."""
        layers = self.config.layers
        names: dict[int, list[str]] = {i: [] for i in range(-1, len(layers))}
        of_a_layer = re.escape(layers[0].prefix.removesuffix("0.")) + r"(\d+)\."
        for name in self.weights.names():
            found = re.match(of_a_layer, name)
            layer = int(found[1]) if found else -1
            if layer not in names:
                raise ValueError(f"tensor {name} belongs to a layer beyond num_hidden_layers {len(layers)}")
            names[layer].append(name)
        for layer, group in names.items():
            path = self.output / self._file(layer)
            if path.exists():
                yield LayerReport(layer, **self.state["layers"][str(layer)], resumed=True)
                continue
            prefix = "" if layer < 0 else layers[layer].prefix
            tensors = {name.removeprefix(prefix): self.weights.read(name) for name in group}
            report = LayerReport(layer, {}, self._notes(), resumed=False)
            if layer >= 0:
                report = self._layer(layer, tensors)
            elif self.calibration is not None:
                self.calibration.begin(tensors)
            self.state["layers"][str(layer)] = {"errors": report.errors, "notes": report.notes}
            self._write_state()
            self._write(path, {f"{prefix}{name}": tensor for name, tensor in tensors.items()})
            if self.calibration is not None:
                self.calibration.leave(layer)
            yield report

    def _layer(self, layer: int, tensors: dict[str, Tensor]) -> LayerReport:
        """Replace the weights in `tensors` by the tensors of the quantized matrices."""
        kinds = {name: tensor.dtype for name, tensor in tensors.items()}
        where = self.config.layers[layer].prefix
        walk = self._alone(layer, tensors) if self.calibration is None else self._calibrated(layer, tensors)
        matrices: dict[str, QuantizedMatrix] = {}
        report = LayerReport(layer, {}, [], resumed=False)
        for module, matrix, error, notes in walk:
            matrices[module] = matrix
            report.errors[f"{where}{module}"] = error
            report.notes.extend(f"{where}{module}: {note}" for note in notes)
        f = self.config.layers[layer].feed_forward
        if self.method.scaled and isinstance(f, Experts):  # a router would choose other experts if it were rounded
            kinds |= dict.fromkeys((f"{matrix.name}.weight" for matrix in f.unquantized), torch.float32)
        for name, tensor in list(tensors.items()):
            tensors[name] = tensor.to(kinds[name])
        for module, matrix in matrices.items():
            del tensors[f"{module}.weight"]
            stored = stored_tensors(matrix, getattr(torch, self.scheme.scale_type))
            tensors |= {f"{module}.{name}": tensor for name, tensor in stored.items()}
        return report

    def _alone(self, number: int, tensors: dict[str, Tensor]) -> Iterator[_Quantized]:
        """Quantize each matrix without inputs; its error is that of the weights."""
        layer = self.config.layers[number]
        for matrix in (module for modules in layer.modules.values() for module in modules):
            weight = tensors[f"{matrix.name}.weight"]
            with _naming(f"tensor {layer.prefix}{matrix.name}.weight"):
                quantized = self.method.quantize(weight, self.scheme, None)
            yield matrix.name, quantized, _relative_error(weight.float(), quantized.dequantize()), []

    def _calibrated(self, number: int, tensors: dict[str, Tensor]) -> Iterator[_Quantized]:
        """Quantize each matrix for its inputs, which come from the quantized matrices before it.

        A matrix's error is that of its products.
        """
        calibration = self.calibration
        assert calibration is not None
        if self.method.scaled:
            scale_channels(calibration, number, tensors, self.scheme)
        layer = self.config.layers[number]
        for product, rows, chunks in calibration.stages(number, tensors):
            if product == ROUTER:
                continue
            matrices = layer.modules[product]
            with _naming(f"{layer.prefix}{product}"):
                inputs = Inputs(chunks, rows, matrices[0].columns, self.method.compensating)
            for matrix in matrices:
                weight = tensors[f"{matrix.name}.weight"].float()
                with _naming(f"tensor {layer.prefix}{matrix.name}.weight"):
                    quantized = self.method.quantize(weight, self.scheme, inputs)
                back = quantized.dequantize()
                tensors[f"{matrix.name}.weight"] = back.to(calibration.dtype)
                error = _relative_error(inputs.sample @ weight.t(), inputs.sample @ back.t())
                yield matrix.name, quantized, error, inputs.notes
                inputs.notes = []

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        unfinished = path.with_suffix(".unfinished")
        # safetensors makes files that only their owner may read. Use the mode of a new file instead (the user's umask).
        unfinished.touch()
        mode = unfinished.stat().st_mode
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(EIO, f"cannot be written ({error})", str(unfinished)) from None
        unfinished.chmod(mode)
        unfinished.replace(path)

    def _lock(self) -> None:
        """Lock the output folder until this object is gone: two runs in it would read each other's activations."""
        folder = os.open(self.output, os.O_RDONLY)
        self._unlock = weakref.finalize(self, os.close, folder)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise ValueError(f"another run quantizes into {self.output}; wait for it, or take another folder") from None

    def _check(self, weights: NamedWeights, sequences: list[NDArray[np.int32]] | None) -> None:
        """Check the tensors' shapes from the files' headers, and the token ids, before the long run begins."""
        for name, shape in self.config.tensors():
            if weights.shape(name) != shape:
                raise ValueError(
                    f"tensor {name} has shape {list(weights.shape(name))}; config.json asks for {list(shape)}"
                )
        most = max((int(sequence.max()) for sequence in sequences or []), default=0)
        if most >= self.config.vocab_size:
            raise ValueError(
                f"the tokenizer gives token {most}, but vocab_size is {self.config.vocab_size}: they do not belong "
                "together"
            )

    def _unquantized(self) -> list[str]:
        """Return the modules that stay in floating point: the head, what chooses experts, and per-layer embeddings.

        transformers has its own name for the head.
        """
        blocks = [(layer.prefix, layer.feed_forward) for layer in self.config.layers]
        chooses = [f"{at}{m.name}" for at, f in blocks if isinstance(f, Experts) for m in f.unquantized]
        p = self.config.ends.per_layer
        before = [] if p is None else [p.projection.name]
        return [*sorted({self.config.head.name, "lm_head"}), *chooses, *before]

    def _notes(self) -> list[str]:
        notes = list(self.config.notes)
        if self.config.wrapped:
            notes.append("the language model is written alone, for text")
        mixture = any(isinstance(layer.feed_forward, Experts) for layer in self.config.layers)
        integers = (self.scheme.bits, self.scheme.activations) == (8, "int8")
        if mixture and (integers or self.config.fused_experts.only_form):
            notes.append("batchinfer reads experts in this form, and transformers does not")
        return notes

    def _file(self, layer: int) -> str:
        return f"model-{layer + 2:05}-of-{self.files:05}.safetensors"

    def _begin(self, stamp: dict[str, Any]) -> None:
        self.state: dict[str, Any] = {"stamp": stamp, "layers": {}}
        path = self.output / STATE
        if path.exists():
            self.state = json.loads(path.read_text())
            if self.state["stamp"] != stamp:
                raise ValueError(
                    f"{self.output} was begun with another model, scheme, method, calibration or version; take "
                    "another folder"
                )
        elif any(self.output.iterdir()):
            raise ValueError(f"{self.output} is not empty; take another folder")
        self._write_state()

    def _write_state(self) -> None:
        """Write the state atomically. A layer's errors are written before its file, so that no file lacks them."""
        unfinished = self.output / f"{STATE}.unfinished"
        unfinished.write_text(json.dumps(self.state))
        unfinished.replace(self.output / STATE)

    def finish(self, card: str) -> None:
        """Write the files beside the weights and the model card. config.json comes last: it completes the checkpoint.

        Raises `ValueError` if a file of the original model has a wrong checksum.
        """
        self.checksums.check()
        (self.output / "README.md").write_text(card)
        files = [self.output / self._file(layer) for layer in range(-1, len(self.config.layers))]
        weight_map = {name: path.name for path in files for name in tensor_names(path)}
        size = sum(path.stat().st_size for path in files)
        write_checksums(self.output, files)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (self.output / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for pattern in _COPIED:
            for source in self.model.glob(pattern):
                target = self.output / source.relative_to(self.model)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, target)
        config = language_model_fields(json.loads((self.model / "config.json").read_text()))
        config["quantization_config"] = quantization_config(self.scheme, self._unquantized())
        if self.untied:
            config["tie_word_embeddings"] = False
        (self.output / "config.json").write_text(json.dumps(config, indent=2))
        shutil.rmtree(self.output / _CALIBRATION, ignore_errors=True)
        (self.output / STATE).unlink()


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Put `what` in front of the message of a `ValueError` raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _relative_error(expected: Tensor, found: Tensor) -> float:
    norm = torch.linalg.vector_norm(expected).clamp(min=1e-30)
    return float(torch.linalg.vector_norm(found.sub_(expected)) / norm)


def _fingerprint(model: Path) -> str:
    """Return a digest of the config and the files' names, sizes and times, which tells checkpoints apart."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(model.glob("*.safetensors"))]
    digest = hashlib.sha256(json.dumps(files).encode())
    digest.update((model / "config.json").read_bytes())
    return digest.hexdigest()


def _digest(sequences: list[NDArray[np.int32]]) -> str:
    digest = hashlib.sha256(repr([len(sequence) for sequence in sequences]).encode())
    for sequence in sequences:
        digest.update(np.asarray(sequence, np.int32).tobytes())
    return digest.hexdigest()
