"""Imports run one way, kernels <- quantize <- batchinfer <- jobs, and the job's parent process stays free of torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["batchinfer.kernels", "batchinfer.quantize", "batchinfer", "batchinfer.jobs"]  # from the bottom up
WITHOUT_TORCH = [
    *(f"batchinfer.{name}" for name in ("chat", "config", "cost_model", "gguf", "model_config", "request")),
    *(f"batchinfer.{name}" for name in ("simulation", "step_cost", "tokenizer")),
]
TEST_ONLY = {"compressed_tensors", "gguf", "transformers"}


def product() -> dict[str, str]:
    """Source by dotted name, of all that is installed."""
    files = [("", path) for path in ROOT.glob("batchinfer/*.py")]
    files += [
        ("batchinfer.", path) for name in ("kernels", "quantize", "jobs") for path in ROOT.glob(f"{name}/**/*.py")
    ]
    return {prefix + ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for prefix, path in files}


def layer(module: str) -> int:
    if module == "batchinfer.__main__":  # what `python -m batchinfer` runs stands above them all
        return len(LAYERS) - 1
    return LAYERS.index(max((name for name in LAYERS if f"{module}.".startswith(f"{name}.")), key=len))


def imports(name: str, source: str, at_start: bool = False) -> set[str]:
    """What a module imports, every prefix of every dotted name; `at_start` only what merely importing it imports."""
    found: set[str] = set()
    for node in at_import(ast.parse(source)) if at_start else ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {".".join(parts[: i + 1]) for parts in (n.split(".") for n in found) for i in range(len(parts))}


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: no function's body, nothing for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            children: list[ast.AST] = list(node.orelse)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            children = []
        else:
            children = [node]
        for child in children:
            yield child
            yield from at_import(child)


def reached(name: str, sources: dict[str, str]) -> set[str]:
    """All that importing a module imports, through modules of ours too."""
    seen: set[str] = set()
    queue = [name]
    while queue:
        module = queue.pop()
        new = imports(module, sources[module], at_start=True) - seen
        seen |= new
        queue += new & sources.keys()
    return seen


def breaches(sources: dict[str, str]) -> list[str]:
    """One line for each import that breaks a rule."""
    found = []
    for name, source in sources.items():
        imported = imports(name, source)
        # The root package is a prefix of all the others, and holds the version alone.
        ours = {
            module
            for module in imported
            if module.startswith("batchinfer.") and (module in sources or module in LAYERS)
        }
        found += [f"{name} imports {module}" for module in sorted(ours) if layer(module) > layer(name)]
        found += [f"{name} imports {module}" for module in sorted(TEST_ONLY & imported)]
        if "triton" in imported and not name.endswith("_triton"):
            found.append(f"{name} imports triton")
        if "ray" in imported and name != "batchinfer.jobs.ray_tasks":
            found.append(f"{name} imports ray")
        at_start = reached(name, sources)
        if "ray" in at_start:
            found.append(f"{name} reaches ray when it is imported")
        if "triton" in at_start and not name.endswith("_triton"):
            found.append(f"{name} reaches triton when it is imported")
        if "torch" in at_start and (layer(name) == LAYERS.index("batchinfer.jobs") or name in WITHOUT_TORCH):
            found.append(f"{name} reaches torch when it is imported")
    return found


def test_product_keeps_the_rules() -> None:
    sources = product()
    assert {"batchinfer.__init__", "batchinfer.kernels.norm", "batchinfer.jobs.spec"} <= sources.keys()
    assert breaches(sources) == []


CLEAN = {
    "batchinfer.kernels.norm": "import torch\ndef f():\n    from batchinfer.kernels import norm_triton\n",
    "batchinfer.kernels.norm_triton": "import triton\n",
    "batchinfer.quantize.rtn": "from batchinfer.kernels.norm import f\n",
    "batchinfer.request": "import numpy\n",
    "batchinfer.engine": "import torch\nfrom batchinfer.quantize import rtn\nfrom batchinfer import request\n",
    "batchinfer.jobs.worker": "from batchinfer.request import x\ndef f():\n    import batchinfer.engine\n",
}


@pytest.mark.parametrize(
    ("module", "line", "breach"),
    [
        ("batchinfer.kernels.norm", "from batchinfer.quantize import rtn", "imports batchinfer.quantize.rtn"),
        ("batchinfer.kernels.norm", "from batchinfer.request import x", "imports batchinfer.request"),
        ("batchinfer.kernels.norm", "from ..quantize import rtn", "imports batchinfer.quantize.rtn"),
        ("batchinfer.quantize.rtn", "def g():\n    import batchinfer.engine", "imports batchinfer.engine"),
        ("batchinfer.engine", "from batchinfer import jobs", "imports batchinfer.jobs"),
        ("batchinfer.engine", "import batchinfer.jobs.worker", "imports batchinfer.jobs.worker"),
        ("batchinfer.engine", "def g():\n    import transformers", "imports transformers"),
        ("batchinfer.engine", "def g():\n    import triton.language", "imports triton"),
        ("batchinfer.kernels.norm", "from . import norm_triton", "reaches triton when it is imported"),
        ("batchinfer.jobs.worker", "from torch import Tensor", "reaches torch when it is imported"),
        ("batchinfer.jobs.worker", "import batchinfer.engine", "reaches torch when it is imported"),
        ("batchinfer.jobs.worker", "class A:\n    import torch", "reaches torch when it is imported"),
        ("batchinfer.request", "import torch", "reaches torch when it is imported"),
        ("batchinfer.jobs.worker", "def g():\n    import ray", "imports ray"),
        ("batchinfer.jobs.worker", "import ray.util", "reaches ray when it is imported"),
    ],
)
def test_each_breach_is_named(module: str, line: str, breach: str) -> None:
    assert breaches(CLEAN) == []
    broken = CLEAN | {module: f"{CLEAN[module]}{line}\n"}
    assert f"{module} {breach}" in breaches(broken)


def test_importing_the_job_loads_no_torch() -> None:
    names = [name for name in product() if name.startswith("batchinfer.jobs.") or name in WITHOUT_TORCH]
    code = f"import sys, {', '.join(names)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
