"""What pip calls to build batchinfer: setuptools' own backend, which also compiles the kernels in C.

The hooks are those of PEP 517 and PEP 660. A wheel with libraries is for this machine's architecture and for any
Python; one without is for all machines.
"""

import sysconfig
from typing import Any

from compile_kernels import KERNELS, architecture, compile_kernels, system_compiler
from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Return what a build needs: also `ziglang`, a C compiler as a package, where the system has none."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_compiler()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Return what an editable install needs, as `get_requires_for_build_wheel` does."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_compiler()]


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Compile the kernels, then build the wheel."""
    _compile()
    settings = dict(config_settings or {})
    if any(KERNELS.glob("cpu_*.so")):
        given = settings.get("--build-option", [])
        platform = f"--plat-name={sysconfig.get_platform()}"
        settings["--build-option"] = [platform, *([given] if isinstance(given, str) else given)]
    return build_meta.build_wheel(wheel_directory, settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Compile the kernels into the checkout, then build the wheel that points there."""
    _compile()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def _compiler() -> list[str]:
    return ["ziglang>=0.17"] if architecture() and system_compiler() is None else []


def _compile() -> None:
    for line in compile_kernels():
        print(f"batchinfer: {line}", flush=True)
