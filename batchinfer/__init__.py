"""batchinfer: offline batch inference over a table of prompts, on one device."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

_HERE = Path(__file__).parent
_VERSION = _HERE / "version.txt"  # written where batchinfer is built or installed, and in no commit

__version__ = _VERSION.read_text("utf-8").strip() if _VERSION.is_file() else "0.0+unknown"


class _FolderBeside:
    """Finds `kernels`, `quantize` and `jobs`, which lie beside this folder in a checkout, and inside it elsewhere."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, folder = name.rpartition(".")
        if package != __name__ or folder not in ("kernels", "quantize", "jobs"):
            return None
        return spec_from_file_location(name, _HERE.parent / folder / "__init__.py")


if (_HERE.parent / "pyproject.toml").is_file() and not (_HERE / "kernels").exists():
    sys.meta_path.append(_FolderBeside)

if TYPE_CHECKING:
    from batchinfer.engine.sampling_params import SamplingParams as SamplingParams
    from batchinfer.llm import LLM as LLM
    from batchinfer.llm import Completion as Completion


def __getattr__(name: str) -> Any:
    """`LLM`, `SamplingParams` and `Completion` are loaded when they are asked for: with them comes torch."""
    if name not in ("LLM", "SamplingParams", "Completion"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from batchinfer import llm

    return getattr(llm, name)
