"""However batchinfer comes to a machine, all of it is there, under one import root, and with its version."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from compile_kernels import SETS, architecture, system_compiler
from product import product
from repository import ROOT

from batchinfer import __version__

CODE = ["batchinfer", "kernels", "quantize", "jobs"]
BESIDE_CODE = [
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    ".gitignore",
    ".gitattributes",
    ".git_archival.txt",
]
VERSION = "7.8.9"
PIP_OPTIONS = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation")
NEUTRAL = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GIT_"))}
COMPILED = sorted(f"cpu_{name}.so" for name in SETS.get(architecture(), ())) if system_compiler() else []
HOOK = "import sys, backend; print(getattr(backend, sys.argv[1])(*sys.argv[2:]))"

# Both run with -S: the environment of these tests has batchinfer too, and must not fill what is missing.
LOOK = """
import ctypes, json, pkgutil, site, sys
from importlib.resources import files
from importlib.util import find_spec
for folder in sys.argv[1:]:
    site.addsitedir(folder)
import batchinfer, batchinfer.jobs, batchinfer.kernels, batchinfer.quantize
modules = set()
for package in batchinfer, batchinfer.jobs, batchinfer.kernels, batchinfer.quantize:
    within = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    modules |= {package.__name__, *(module.name for module in within)}
libraries = sorted(path for path in files("batchinfer.kernels").iterdir() if path.suffix == ".so")
print(json.dumps({
    "libraries": [path.name for path in libraries if ctypes.CDLL(str(path)).attention],
    "modules": sorted(name for name in modules if name.rpartition(".")[2] not in {path.stem for path in libraries}),
    "recipes": sorted(path.name for path in files("batchinfer.quantize").joinpath("recipes").iterdir()),
    "beside": [name for name in ("kernels", "quantize", "jobs") if find_spec(name)],
    "version": batchinfer.__version__,
    "file": batchinfer.__file__,
}))
"""

START = """
import runpy, site, sys
script, *folders = sys.argv[1:]
for folder in folders:
    site.addsitedir(folder)
sys.argv = [script, "--version"]
runpy.run_path(script, run_name="__main__")
"""


@dataclass(frozen=True)
class Place:
    """A way that batchinfer can be on a machine: where its code lies, and what makes Python find it."""

    code: Path
    site: Path | None  # a folder of installed packages; None: Python runs in `code`
    version: str = VERSION

    def look(self, cwd: Path) -> Any:
        """What Python finds there, run from `cwd`."""
        if self.site is None:
            return json.loads(run(sys.executable, "-S", "-c", LOOK, cwd=self.code, PYTHONPATH="."))
        return json.loads(run(sys.executable, "-S", "-c", LOOK, self.site, cwd=cwd))


def run(*command: object, cwd: Path, **env: str) -> str:
    """The command's standard output, in `cwd`, without this process's import paths."""
    done = subprocess.run([*map(str, command)], cwd=cwd, env=NEUTRAL | env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def hook(checkout: Path, name: str, *arguments: object, **env: str) -> list[str]:
    """The lines that a hook of the build backend prints, its result last."""
    path = f"building{os.pathsep}{env.pop('PYTHONPATH', '')}"
    return run(sys.executable, "-c", HOOK, name, *arguments, cwd=checkout, PYTHONPATH=path, **env).splitlines()


def install(site: Path, *what: object) -> None:
    run(sys.executable, "-m", "pip", "install", *PIP_OPTIONS, "--target", site, *what, cwd=site.parent)


@pytest.fixture(scope="module", autouse=True)
def quick_compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the compiler not optimize: what is installed here is loaded, and computes nothing."""
    compiler = system_compiler()
    if compiler is None:
        yield
        return
    quick = tmp_path_factory.mktemp("compiler") / "cc"
    quick.write_text(f'#!/bin/sh\nexec {shlex.join(compiler)} "$@" -O0\n')
    quick.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NEUTRAL, "CC", str(quick))
        yield


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the tree as it is now in its one commit, which is tagged."""
    tree = tmp_path_factory.mktemp("checkout")
    for name in BESIDE_CODE:
        shutil.copy(ROOT / name, tree)
    for name in (*CODE, "building"):
        built = shutil.ignore_patterns("__pycache__", "version.txt", "cpu_*.so")
        shutil.copytree(ROOT / name, tree / name, ignore=built)
    git = ("git", "-c", "user.name=test", "-c", "user.email=", "-c", "commit.gpgsign=false")
    run(*git, "init", "--quiet", cwd=tree)
    run(*git, "add", "--all", cwd=tree)
    run(*git, "commit", "--quiet", "--message", "The tree", cwd=tree)
    run(*git, "tag", f"v{VERSION}", cwd=tree)
    return tree


@pytest.fixture(scope="module")
def archive(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ZIP that a hosting site offers for download."""
    path = tmp_path_factory.mktemp("archive") / "batchinfer.zip"
    run("git", "archive", "--format=zip", "--prefix=batchinfer-main/", "--output", path, "HEAD", cwd=checkout)
    return path


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    return out / hook(checkout, "build_sdist", out)[-1]


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", *PIP_OPTIONS, "--wheel-dir", out, checkout, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=["wheel", "sdist", "zip", "editable", "bare"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp(request.param)
    site = folder / "site"
    match request.param:
        case "wheel" | "sdist":
            install(site, request.getfixturevalue(request.param))
        case "zip":
            install(site, request.getfixturevalue("archive"))
        case "editable":
            checkout = request.getfixturevalue("checkout")
            install(site, "--editable", checkout)
            return Place(checkout, site)
        case "bare":  # unpacked anew, since building writes the version into a checkout
            with zipfile.ZipFile(request.getfixturevalue("archive")) as archive:
                archive.extractall(folder)
            return Place(folder / "batchinfer-main", None, "0.0+unknown")
    return Place(site, site)


def test_every_module_and_recipe_is_there(place: Place, tmp_path: Path) -> None:
    found = place.look(tmp_path)
    assert Path(found["file"]).parent == place.code / "batchinfer"
    modules = set(product())
    assert {"batchinfer", "batchinfer.kernels.norm", "batchinfer.jobs.cli.main"} <= modules
    assert set(found["modules"]) == modules
    recipes = sorted(path.name for path in ROOT.glob("quantize/recipes/*.toml"))
    assert found["recipes"] == recipes != []


def test_the_kernels_in_c_are_compiled_by_each_way_to_install(place: Place, tmp_path: Path) -> None:
    assert place.look(tmp_path)["libraries"] == (COMPILED if place.site else [])


def test_other_projects_names_stay_free(place: Place, tmp_path: Path) -> None:
    """A bare checkout alone, where Python runs in it, has the folders by their own names too."""
    assert place.look(tmp_path)["beside"] == ([] if place.site else ["kernels", "quantize", "jobs"])


def test_the_version_is_that_of_the_tag(place: Place, tmp_path: Path) -> None:
    assert place.look(tmp_path)["version"] == place.version


def test_the_command_runs_from_another_folder(place: Place, tmp_path: Path) -> None:
    if place.site is None:
        said = run(sys.executable, "-m", "batchinfer", "--version", cwd=tmp_path, PYTHONPATH=str(place.code))
    else:
        script, dependencies = place.site / "bin" / "batchinfer", sysconfig.get_path("purelib")
        said = run(sys.executable, "-S", "-c", START, script, place.site, dependencies, cwd=tmp_path)
    assert said == f"batchinfer {place.version}\n"


def test_the_command_of_this_environment_runs_from_another_folder(tmp_path: Path) -> None:
    said = run(Path(sysconfig.get_path("scripts")) / "batchinfer", "--version", cwd=tmp_path)
    assert said == f"batchinfer {__version__}\n"


def test_wheel_holds_the_sources_the_license_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = {name for name in names if name.startswith(f"batchinfer_runner-{VERSION}.dist-info/")}
    assert any(name.endswith("/licenses/LICENSE") for name in about)
    sources = [path for folder in CODE for path in ROOT.glob(f"{folder}/**/*") if path.suffix in {".py", ".toml"}]
    paths = [path.relative_to(ROOT).as_posix() for path in sources]
    code = {path if path.startswith("batchinfer/") else f"batchinfer/{path}" for path in paths}
    libraries = {f"batchinfer/kernels/{name}" for name in COMPILED}
    assert names - about == code | libraries | {"batchinfer/version.txt"}


def test_a_wheel_with_libraries_is_for_its_architecture_and_for_any_python(wheel: Path) -> None:
    system = f"linux_{architecture()}" if COMPILED else "any"
    assert wheel.name == f"batchinfer_runner-{VERSION}-py3-none-{system}.whl"


def test_sdist_holds_every_file_of_the_repository(sdist: Path, checkout: Path) -> None:
    tracked = set(run("git", "ls-files", cwd=checkout).splitlines())
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "jobs/spec.py", "quantize/recipes/w4a16-gptq.toml"} <= tracked
    assert {"kernels/attention_cpu.c", "kernels/vector_cpu.h", "building/backend.py"} <= tracked
    assert tracked | {"PKG-INFO", "batchinfer/version.txt"} <= names
    assert not [name for name in names if name.endswith(".so")]


@pytest.fixture
def without_compiler(tmp_path: Path) -> dict[str, str]:
    """An environment with git, which tells the version, and without a C compiler that works."""
    git = shutil.which("git")
    assert git is not None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to(git)
    (tmp_path / "ziglang.py").write_text("raise SystemExit('not installed')")
    return {"PATH": str(tmp_path / "bin"), "CC": "", "PYTHONPATH": str(tmp_path)}


@pytest.mark.skipif(not architecture(), reason="there are no kernels in C for this machine")
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_a_compiler_is_asked_for_only_where_there_is_none(
    kind: str, checkout: Path, without_compiler: dict[str, str]
) -> None:
    name = f"get_requires_for_build_{kind}"
    assert "ziglang" in hook(checkout, name, **without_compiler)[-1]
    assert ("ziglang" in hook(checkout, name)[-1]) == (not COMPILED)


def test_without_any_compiler_the_reference_is_installed_and_runs(
    checkout: Path, without_compiler: dict[str, str], tmp_path: Path
) -> None:
    tree, site = tmp_path / "tree", tmp_path / "site"
    run("git", "clone", "--quiet", checkout, tree, cwd=tmp_path)
    *said, wheel = hook(tree, "build_wheel", tmp_path, **without_compiler)
    assert [line for line in said if "torch computes what they would" in line and line.startswith("batchinfer: ")]
    assert wheel == f"batchinfer_runner-{VERSION}-py3-none-any.whl"
    install(site, tmp_path / wheel)
    chosen = (
        "import site, sys; [site.addsitedir(folder) for folder in sys.argv[1:]]\n"
        "from batchinfer.kernels.backends import choose_backend\n"
        "from batchinfer.kernels.cpu_library import why_reference\n"
        "print(type(choose_backend('cpu', True)).__name__, why_reference())"
    )
    path = run(sys.executable, "-S", "-c", chosen, site, sysconfig.get_path("purelib"), cwd=tmp_path)
    assert path.startswith("CpuBackend the kernels in C are not built: install a C compiler")
