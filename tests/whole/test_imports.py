"""Imports run one way, folder by folder and without circles, and the job's parent process stays free of torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest
from product import product
from repository import ROOT

# What imports what, from the ground up; those of one line do not import each other.
FLOORS = [
    ["kernels", "errors", "flag"],
    ["host"],
    ["text", "formats"],
    ["models"],  # and models.families, a part of it
    ["engine"],  # and engine.drafts, a part of it
    ["cost", "quality", "prompt_reader", "token_logprobs"],
    ["llm"],
    ["quantize", "lm_eval"],
    [
        *("jobs.amounts", "jobs.chat_flags", "jobs.flag_values", "jobs.label_flags", "jobs.log", "jobs.score_flags"),
        *("jobs.openai_batch_flags", "jobs.sampling_flags", "jobs.speculation", "jobs.structure_flags"),
    ],
    ["jobs.flags"],
    ["jobs.results"],
    ["jobs.spec"],
    ["jobs.tables"],
    ["jobs.rows"],
    ["jobs.openai_batch"],
    ["jobs.process"],
    ["jobs.plan"],
    ["jobs"],
    ["jobs.launch"],
    ["jobs.cli"],
    ["__main__"],
]
FLOOR = {f"batchinfer.{name}": number for number, names in enumerate(FLOORS) for name in names}
# Torch is what these must not load: the job's parent process reads configs and plans without it.
WITHOUT_TORCH = (
    "batchinfer.errors",
    "batchinfer.flag",
    "batchinfer.host.device",
    "batchinfer.host.files",
    "batchinfer.host.limits",
    "batchinfer.host.memory",
    "batchinfer.kernels.gpu",
    "batchinfer.kernels.ragged",
    "batchinfer.text",
    "batchinfer.formats.fields",
    "batchinfer.formats.gguf_file",
    "batchinfer.formats.scheme",
    "batchinfer.models.config",
    "batchinfer.models.config_file",
    "batchinfer.models.families",
    "batchinfer.models.gguf_architectures",
    "batchinfer.models.gguf_config",
    "batchinfer.models.gguf_entries",
    "batchinfer.models.gguf_folder",
    "batchinfer.models.gguf_layout",
    "batchinfer.models.gguf_rope",
    "batchinfer.models.gguf_tokenizer",
    "batchinfer.models.hub",
    "batchinfer.models.layer",
    "batchinfer.models.rope",
    "batchinfer.models.wrappers",
    "batchinfer.engine.config",
    "batchinfer.engine.request",
    "batchinfer.engine.sampling_params",
    "batchinfer.engine.step_policy",
    "batchinfer.cost.cost_model",
    "batchinfer.cost.simulate_steps",
    "batchinfer.cost.step_cost",
    "batchinfer.jobs",
)
TEST_ONLY = {"compressed_tensors", "gguf", "transformers"}


def room(module: str) -> str:
    """The folder or file on the plan that a module lies in."""
    return max((known for known in FLOOR if f"{module}.".startswith(f"{known}.")), key=len)


def may_import(name: str, module: str) -> bool:
    above, below = room(name), room(module)
    return above == below or FLOOR[above] > FLOOR[below]


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


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, late imports included; none if there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def breaches(sources: dict[str, str]) -> list[str]:
    """One line for each import that breaks a rule."""
    found, graph = [], {}
    for name, source in sources.items():
        imported = imports(name, source)
        # A package is a prefix of its modules, and importing it imports nothing else: its `__init__` is a docstring.
        ours = {module for module in imported & sources.keys() if not is_package(module, sources)}
        graph[name] = ours
        if name != "batchinfer":
            found += [f"{name} imports {module}" for module in sorted(ours) if not may_import(name, module)]
        found += [f"{name} imports {module}" for module in sorted(TEST_ONLY & imported)]
        if "triton" in imported and not name.endswith("_triton"):
            found.append(f"{name} imports triton")
        if "ray" in imported and name != "batchinfer.jobs.launch.ray_tasks":
            found.append(f"{name} imports ray")
        at_start = reached(name, sources)
        if "ray" in at_start:
            found.append(f"{name} reaches ray when it is imported")
        if "triton" in at_start and not name.endswith("_triton"):
            found.append(f"{name} reaches triton when it is imported")
        if "torch" in at_start and without_torch(name):
            found.append(f"{name} reaches torch when it is imported")
    if modules := circle(graph):
        found.append(f"circle: {' <- '.join(modules)}")
    return found


def is_package(module: str, sources: dict[str, str]) -> bool:
    return any(name.startswith(f"{module}.") for name in sources)


def without_torch(module: str) -> bool:
    return any(f"{module}.".startswith(f"{name}.") for name in WITHOUT_TORCH)


def test_product_keeps_the_rules() -> None:
    sources = product()
    assert {"batchinfer", "batchinfer.kernels.norm", "batchinfer.jobs.spec"} <= sources.keys()
    assert breaches(sources) == []


def test_packages_hold_nothing_but_a_docstring() -> None:
    """So that importing a module imports no neighbour."""
    sources = product()
    packages = [name for name in sources if is_package(name, sources) and name != "batchinfer"]
    assert [name for name in packages if len(ast.parse(sources[name]).body) != 1] == []


def test_every_folder_is_on_the_plan() -> None:
    sources = product()
    packages = {name for name in sources if is_package(name, sources) and name != "batchinfer"}
    assert packages - FLOOR.keys() == {"batchinfer.engine.drafts", "batchinfer.models.families"}


CLEAN = {
    "batchinfer": "",
    "batchinfer.kernels.norm": "import torch\ndef f():\n    from batchinfer.kernels import norm_triton\n",
    "batchinfer.kernels.norm_triton": "import triton\n",
    "batchinfer.text.chat": "from batchinfer.errors import Refused\n",
    "batchinfer.formats.awq": "from batchinfer.kernels.norm import f\n",
    "batchinfer.errors": "",
    "batchinfer.models.config": "import numpy\n",
    "batchinfer.engine.engine": "import torch\nfrom batchinfer.engine.drafts import gate\n",
    "batchinfer.engine.drafts.gate": "from batchinfer.engine.request import x\n",
    "batchinfer.engine.request": "import numpy\n",
    "batchinfer.quantize.walk": "from batchinfer.formats import awq\n",
    "batchinfer.jobs.spec": "from batchinfer.engine import request\n",
    "batchinfer.jobs.process.worker": "import batchinfer.jobs.spec\ndef f():\n    import batchinfer.engine.engine\n",
}


@pytest.mark.parametrize(
    ("module", "line", "breach"),
    [
        ("kernels.norm", "from batchinfer.formats import awq", "imports batchinfer.formats.awq"),
        ("kernels.norm", "from batchinfer.errors import Refused", "imports batchinfer.errors"),
        ("kernels.norm", "from ..formats import awq", "imports batchinfer.formats.awq"),
        ("formats.awq", "from batchinfer.text.chat import x", "imports batchinfer.text.chat"),
        ("formats.awq", "def g():\n    import batchinfer.models.config", "imports batchinfer.models.config"),
        ("models.config", "from batchinfer.engine import request", "imports batchinfer.engine.request"),
        ("engine.engine", "from batchinfer.quantize.walk import x", "imports batchinfer.quantize.walk"),
        ("engine.engine", "import batchinfer.jobs.process.worker", "imports batchinfer.jobs.process.worker"),
        ("jobs.spec", "import batchinfer.jobs.process.worker", "imports batchinfer.jobs.process.worker"),
        ("engine.engine", "def g():\n    import transformers", "imports transformers"),
        ("engine.engine", "def g():\n    import triton.language", "imports triton"),
        ("kernels.norm", "from . import norm_triton", "reaches triton when it is imported"),
        ("jobs.process.worker", "from torch import Tensor", "reaches torch when it is imported"),
        ("jobs.process.worker", "import batchinfer.engine.engine", "reaches torch when it is imported"),
        ("jobs.process.worker", "class A:\n    import torch", "reaches torch when it is imported"),
        ("engine.request", "import torch", "reaches torch when it is imported"),
        ("jobs.process.worker", "def g():\n    import ray", "imports ray"),
        ("jobs.process.worker", "import ray.util", "reaches ray when it is imported"),
    ],
)
def test_each_breach_is_named(module: str, line: str, breach: str) -> None:
    assert breaches(CLEAN) == []
    name = f"batchinfer.{module}"
    broken = CLEAN | {name: f"{CLEAN[name]}{line}\n"}
    assert f"{name} {breach}" in breaches(broken)


@pytest.mark.parametrize(
    "line", ["from batchinfer.engine import engine", "def f():\n    from batchinfer.engine import engine"]
)
def test_circles_are_named_though_an_import_is_late(line: str) -> None:
    name = "batchinfer.engine.drafts.gate"
    (breach,) = breaches(CLEAN | {name: f"{CLEAN[name]}{line}\n"})
    assert breach.startswith("circle: ") and name in breach and "batchinfer.engine.engine" in breach


def test_what_must_not_load_torch_does_not() -> None:
    names = sorted(name for name in product() if without_torch(name))
    code = f"import sys, {', '.join(names)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
