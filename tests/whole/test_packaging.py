"""What is installed: everything under one import root, and nothing beside it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from repository import ROOT

FOLDERS = {"kernels": "batchinfer/kernels", "quantize": "batchinfer/quantize", "jobs": "batchinfer/jobs"}
CODE = ["batchinfer", *FOLDERS]
NEUTRAL = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(*command: object, cwd: Path, **env: str) -> str:
    """The command's standard output, in `cwd`, without this process's import paths."""
    done = subprocess.run([*map(str, command)], cwd=cwd, env=NEUTRAL | env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tree, so that no earlier build's leavings are in it; built with no index."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in "pyproject.toml", "README.md", "LICENSE":
        shutil.copy(ROOT / name, tree)
    for name in CODE:
        shutil.copytree(ROOT / name, tree / name, symlinks=True)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", out, tree, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_every_file_under_batchinfer_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    code = {name for name in names if ".dist-info/" not in name}
    sources = [path for folder in CODE for path in (ROOT / folder).glob("**/*") if path.suffix in {".py", ".toml"}]
    wanted = {path.relative_to(ROOT).as_posix() for path in sources}
    assert {"batchinfer/__init__.py", "jobs/spec.py"} <= wanted
    assert code == {name if name.startswith("batchinfer/") else f"batchinfer/{name}" for name in wanted}
    assert {name.split("/")[0] for name in names - code} == {f"batchinfer-{version('batchinfer')}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_works_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    run(sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    assert {path.name for path in target.iterdir()} == {"batchinfer", "bin", wheel.name.split("-py3")[0] + ".dist-info"}
    code = "import batchinfer.jobs.spec, batchinfer.kernels, sys; print(batchinfer.jobs.spec.__file__)"
    assert Path(run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target)).strip()).is_relative_to(target)


def test_version_from_another_directory(tmp_path: Path) -> None:
    script = Path(sysconfig.get_path("scripts")) / "batchinfer"
    assert version("batchinfer") in run(script, "--version", cwd=tmp_path).split()


@pytest.mark.parametrize("name", FOLDERS)
def test_no_top_level_package(name: str, tmp_path: Path) -> None:
    code = f"import importlib.util as u; print(u.find_spec({name!r}), u.find_spec('batchinfer.{name}') is not None)"
    assert run(sys.executable, "-c", code, cwd=tmp_path).split() == ["None", "True"]


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_is_a_link_and_no_regular_package(name: str) -> None:
    link = ROOT / FOLDERS[name]
    assert link.is_symlink()
    assert link.resolve() == ROOT / name
    assert not (link / "__init__.py").exists()
