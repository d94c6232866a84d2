"""A quantized checkpoint from a floating-point one: the walk with its progress, the model card, the closing lines."""

import shlex
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

import batchinfer
from batchinfer.jobs.hub import resolve_model
from batchinfer.jobs.report import peak_memory_bytes
from batchinfer.jobs.spec import Refused, UsageError, read_job_file

RECIPES = Path(batchinfer.__file__).parent / "quantize" / "recipes"


def read_recipe(name: str) -> dict[str, Any]:
    """The flags of a recipe that comes with batchinfer, or of a TOML file. Raises `UsageError`."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not name.endswith(".toml") and not path.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
        raise UsageError(f"--recipe is {name!r}; it must be one of {known}, or a TOML file")
    return read_job_file(path, {"description", "scheme", "method", "group_size"}, "--recipe")


@dataclass(frozen=True)
class Quantized:
    """What was made, and what it lost."""

    output: Path
    scheme: str
    method: str
    group_size: int
    layers_resumed: int
    seconds: float
    peak_memory_bytes: int
    bytes_before: int
    bytes_after: int
    errors: dict[str, float]  # the mean relative error of the weights, by the modules' last name

    def table(self) -> str:
        """For people."""
        group = f"groups of {self.group_size}" if self.group_size else "whole channels"
        lines = {
            "output": str(self.output),
            "scheme": f"{self.scheme}, {group}, by {self.method}",
            "size": f"{self.bytes_before / 1e6:,.0f} MB to {self.bytes_after / 1e6:,.0f} MB",
            "time": f"{self.seconds:.1f} s" + (f", {self.layers_resumed} files kept" if self.layers_resumed else ""),
            "peak memory": f"{self.peak_memory_bytes / 1e6:,.0f} MB",
        }
        lines |= {f"error of {name}": f"{100 * error:.2f} %" for name, error in self.errors.items()}
        width = max(map(len, lines)) + 2
        return "\n".join(f"{name:<{width}}{value}" for name, value in lines.items())


def quantize(
    model: str, revision: str | None, output: Path, scheme: str, method: str, group_size: int | None
) -> Quantized:
    """Quantize `model` into the folder `output`. Raises `UsageError`, `Refused` and `OSError`."""
    from batchinfer.quantize.rtn import round_to_nearest
    from batchinfer.quantize.scheme import weight_scheme
    from batchinfer.quantizer import Method, Quantizer

    methods: dict[str, Method] = {"rtn": round_to_nearest, "rtn-mse": partial(round_to_nearest, clip=True)}
    if method not in methods:
        raise UsageError(f"--method is {method!r}; it must be one of {', '.join(methods)}")
    try:
        chosen = weight_scheme(scheme, group_size)
    except ValueError as refusal:
        field, _, rest = str(refusal).partition(" ")
        raise UsageError(f"--{field.replace('_', '-')} {rest}") from refusal
    source = resolve_model(model, revision)
    started = time.monotonic()
    try:
        quantizer = Quantizer(source, output, chosen, method, methods[method])
        bar = tqdm(quantizer.run(), total=quantizer.steps, unit=" files", disable=None, file=sys.stderr)
        reports = list(bar)
    except ValueError as refusal:
        raise Refused(str(refusal)) from refusal
    by_module: dict[str, list[float]] = {}
    for report in reports:
        for module, error in report.errors.items():
            by_module.setdefault(module.rpartition(".")[2], []).append(error)
    done = Quantized(
        output,
        chosen.name,
        method,
        chosen.group_size,
        sum(report.resumed for report in reports),
        time.monotonic() - started,
        peak_memory_bytes(),
        _size(source),
        _size(output),
        {name: sum(errors) / len(errors) for name, errors in by_module.items()},
    )
    (output / "README.md").write_text(_card(model, done))
    return done


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _card(model: str, done: Quantized) -> str:
    return f"""# {Path(model).name}, {done.scheme}

Made from `{model}` by batchinfer {batchinfer.__version__}:

```
{shlex.join(sys.argv)}
```

The matrices of the layers are quantized ({done.scheme}, {done.method}); embeddings, norms and the output head are as
they were. Format: compressed-tensors. Relative error of the weights, the mean over layers:

| matrix | error |
|---|---:|
""" + "".join(f"| {name} | {100 * error:.2f} % |\n" for name, error in done.errors.items())
