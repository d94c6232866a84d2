"""However batchinfer comes to a machine, all of it is there, under one import root, and with its version."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from product import product
from repository import ROOT

from batchinfer import __version__

CODE = ["batchinfer", "kernels", "quantize", "jobs"]
BESIDE_CODE = ["pyproject.toml", "README.md", "LICENSE", ".gitignore", ".gitattributes", ".git_archival.txt"]
VERSION = "7.8.9"
PIP_OPTIONS = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation")
NEUTRAL = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GIT_"))}

# Both run with -S: the environment of these tests has batchinfer too, and must not fill what is missing.
LOOK = """
import json, pkgutil, site, sys
from importlib.resources import files
from importlib.util import find_spec
for folder in sys.argv[1:]:
    site.addsitedir(folder)
import batchinfer, batchinfer.jobs, batchinfer.kernels, batchinfer.quantize
modules = set()
for package in batchinfer, batchinfer.jobs, batchinfer.kernels, batchinfer.quantize:
    within = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    modules |= {package.__name__, *(module.name for module in within)}
print(json.dumps({
    "modules": sorted(modules),
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


def install(site: Path, *what: object) -> None:
    run(sys.executable, "-m", "pip", "install", *PIP_OPTIONS, "--target", site, *what, cwd=site.parent)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the tree as it is now in its one commit, which is tagged."""
    tree = tmp_path_factory.mktemp("checkout")
    for name in BESIDE_CODE:
        shutil.copy(ROOT / name, tree)
    for name in CODE:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "version.txt"))
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
    build = "import sys, setuptools.build_meta as backend; print(backend.build_sdist(sys.argv[1]))"
    name = run(sys.executable, "-c", build, out, cwd=checkout).splitlines()[-1]
    return out / name


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
    assert names - about == code | {"batchinfer/version.txt"}


def test_sdist_holds_every_file_of_the_repository(sdist: Path, checkout: Path) -> None:
    tracked = set(run("git", "ls-files", cwd=checkout).splitlines())
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "jobs/spec.py", "quantize/recipes/w4a16-gptq.toml"} <= tracked
    assert tracked | {"PKG-INFO", "batchinfer/version.txt"} <= names
