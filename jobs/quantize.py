"""Quantizing a checkpoint: the run with its progress, the model card and the closing table."""

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import batchinfer.quantize
from batchinfer.errors import Interrupted, Refused, UsageError
from batchinfer.host.memory import peak_memory_bytes
from batchinfer.host.own_process import own_process
from batchinfer.jobs.amounts import count_of
from batchinfer.jobs.calibration_rows import TokenIds, calibration_sequences
from batchinfer.jobs.flag_values import read_job_file
from batchinfer.jobs.process.interruption import Interruption
from batchinfer.models.hub import resolve_model
from batchinfer.text.tokenizer import Tokenizer

TOKENS = 512
"""Default for the most tokens of a calibration row."""
RECIPE_KEYS = ("description", "scheme", "method", "group_size", "rotate")
RECIPES = Path(batchinfer.quantize.__path__[0]) / "recipes"


def read_recipe(name: str) -> dict[str, Any]:
    """Return the flags of a recipe, by the name of one that comes with batchinfer or as a TOML file.

    Raises `UsageError` if there is no such recipe, or if its keys or values are wrong.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not name.endswith(".toml") and not path.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
        raise UsageError(f"--recipe is {name!r}; it must be one of {known}, or a TOML file")
    return read_job_file(path, dict.fromkeys(RECIPE_KEYS), "--recipe")


@dataclass(frozen=True)
class Quantized:
    """The result of quantizing: the new checkpoint's figures and errors."""

    output: Path
    scheme: str
    method: str  # with what was done before it, as 'gptq after rotation'
    group_size: int
    calibration: str | None
    layers_resumed: int
    seconds: float
    peak_memory_bytes: int
    bytes_before: int
    bytes_after: int
    notes: list[str]
    errors: dict[str, float]  # mean relative error of all matrices whose module's name ends in this

    @property
    def measured(self) -> str:
        """Name of the quantity whose errors were measured."""
        return "weights" if self.calibration is None else "matrix products on the calibration text"

    def table(self) -> str:
        """Return the result as aligned lines."""
        group = f"groups of {self.group_size}" if self.group_size else "whole channels"
        lines = {
            "output": str(self.output),
            "scheme": f"{self.scheme}, {group}, by {self.method}",
            "calibration": self.calibration or "none: this method reads the weights only",
            "size": f"{self.bytes_before / 1e6:,.0f} MB to {self.bytes_after / 1e6:,.0f} MB",
            "time": f"{self.seconds:.1f} s"
            + (f"; {count_of(self.layers_resumed, 'file')} made before" if self.layers_resumed else ""),
            "peak memory": f"{self.peak_memory_bytes / 1e6:,.0f} MB",
        }
        lines["error of"] = self.measured
        lines |= {f"  {name}": f"{100 * error:.2f} %" for name, error in self.errors.items()}
        width = max(map(len, lines)) + 2
        shown = [f"{name:<{width}}{value}" for name, value in lines.items()]
        return "\n".join(shown + [f"{'note':<{width}}{note}" for note in self.notes])


@dataclass(frozen=True)
class CalibrationRows:
    """The rows that a calibrated method reads. Without `data`, they come from the source of Python's standard
    library."""

    data: Path | None = None
    column: str = "text"
    rows: int = 128
    tokens: int | None = None  # most tokens of a row; None: 512, or the model's context if that is shorter
    seed: int = 0


def quantize(
    model: str,
    revision: str | None,
    output: Path,
    scheme: str,
    method: str,
    group_size: int | None,
    rows: CalibrationRows,
    rotate: bool = False,
) -> Quantized:
    """Quantize `model` into the folder `output`. Raises `UsageError`, `Refused` and `OSError`.

    After Ctrl-C or SIGTERM, the current layer is finished and written, and `Interrupted` is raised.
    """
    from batchinfer.formats.scheme import weight_scheme
    from batchinfer.quantize import methods
    from batchinfer.quantize.walk import Quantizer

    try:
        chosen = weight_scheme(scheme, group_size)
        way = methods.method(method)
        way.check(chosen)
    except ValueError as refusal:
        field, _, rest = str(refusal).partition(" ")
        raise UsageError(f"--{field.replace('_', '-')} {rest}") from refusal
    if model.endswith(".gguf"):
        raise Refused(
            f"model {model} is a GGUF file, which cannot be quantized again; give the checkpoint that it was made from"
        )
    source = resolve_model(model, revision)
    own_process()
    started = time.monotonic()
    try:
        sequences = _sequences(source, rows) if way.calibrated else None
        quantizer = Quantizer(source, output, chosen, way, sequences, rows.seed if rotate else None)
        reports = []
        bar = tqdm(quantizer.run(), total=quantizer.files, unit=" files", disable=None, file=sys.stderr)
        with Interruption() as interruption, bar:
            for report in bar:
                reports.append(report)
                if interruption.requested:
                    raise Interrupted(
                        f"stopped after {len(reports)} of {quantizer.files} files; give the same command to continue"
                    )
    except ValueError as refusal:
        raise Refused(str(refusal)) from refusal
    notes = [note for report in reports for note in report.notes]
    by_module: dict[str, list[float]] = {}
    for report in reports:
        for module, error in report.errors.items():
            by_module.setdefault(module.rpartition(".")[2], []).append(error)
    done = Quantized(
        output,
        chosen.name,
        f"{method} after rotation" if rotate else method,
        chosen.group_size,
        None if sequences is None else _described(rows, sequences),
        sum(report.resumed for report in reports),
        time.monotonic() - started,
        peak_memory_bytes(),
        _size(source),
        _size(output),
        notes + ([] if sequences is None else _few(rows, sequences, quantizer.config.hidden_size)),
        {name: sum(errors) / len(errors) for name, errors in by_module.items()},
    )
    quantizer.finish(_card(model, done))
    return done


def _sequences(model: Path, rows: CalibrationRows) -> list[TokenIds]:
    from batchinfer.models.config import read_model_config

    longest = read_model_config(model).max_positions
    tokens = min(TOKENS, longest) if rows.tokens is None else rows.tokens
    if tokens > longest:
        raise UsageError(f"--calibration-tokens is {tokens}; it must be at most {longest}, the model's context")
    return calibration_sequences(rows.data, rows.column, rows.rows, tokens, rows.seed, Tokenizer.load(model))


def _few(rows: CalibrationRows, sequences: list[TokenIds], hidden_size: int) -> list[str]:
    """Return notes if there is too little text for the calibration."""
    notes = []
    tokens = sum(map(len, sequences))
    if len(sequences) < rows.rows:
        notes.append(
            f"the text gave only {len(sequences)} of the {rows.rows} sequences that --calibration-rows asks for"
        )
    if tokens < hidden_size:
        notes.append(f"{tokens} tokens of calibration are few for hidden_size {hidden_size}; give more rows")
    return notes


def _described(rows: CalibrationRows, sequences: list[TokenIds]) -> str:
    source = "the standard library's source" if rows.data is None else f"column {rows.column!r} of {rows.data.name}"
    return f"{len(sequences):,} sequences, {sum(map(len, sequences)):,} tokens of {source}, seed {rows.seed}"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _card(model: str, done: Quantized) -> str:
    return (
        f"""# {Path(model).name}, {done.scheme}

Made from `{model}` by batchinfer {batchinfer.__version__}:

```
{shlex.join(sys.argv)}
```

The matrices of the layers are quantized ({done.scheme}, {done.method}). The output head is in floating point.
Calibration: {done.calibration or "none"}. Format: compressed-tensors. The table has relative errors, measured on
{done.measured}, as the mean over layers:

| matrix | error |
|---|---:|
"""
        + "".join(f"| {name} | {100 * error:.2f} % |\n" for name, error in done.errors.items())
        + "".join(f"\n{note}\n" for note in done.notes)
    )
