"""The kernels in C that run on this machine, for tests."""

import os
from typing import Any

import pytest

from batchinfer.kernels.cpu_library import CPU_PATHS, REFERENCE, cpu_path, load, why_reference


def libraries() -> list[Any]:
    """Return the library of each path that runs here, as parameters of a test, which is skipped if there is none."""
    found = [pytest.param(load(path), id=path) for path in paths()]
    assert found or "CI" not in os.environ, why_reference()
    return found or [pytest.param(None, marks=pytest.mark.skip("no kernels in C run here"), id="none")]


def paths() -> list[str]:
    """Return the paths in C that run here."""

    def runs(path: str) -> bool:
        try:
            return cpu_path(path) == path
        except ValueError:
            return False

    return [path for path in CPU_PATHS if path not in ("auto", REFERENCE) and runs(path)]
