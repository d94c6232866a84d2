"""batchinfer: offline batch inference over a table of prompts, on one device."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The folders `kernels`, `quantize` and `jobs` lie beside this one in a checkout, and inside it where it is installed.
_checkout = Path(__file__).parent.parent
if (_checkout / "pyproject.toml").is_file() and not (Path(__file__).parent / "kernels").exists():
    __path__.append(str(_checkout))

if TYPE_CHECKING:
    from batchinfer.engine.request import SamplingParams as SamplingParams
    from batchinfer.llm import LLM as LLM
    from batchinfer.llm import Completion as Completion


def __getattr__(name: str) -> Any:
    """`LLM`, `SamplingParams` and `Completion` are loaded when they are asked for: with them comes torch."""
    if name not in ("LLM", "SamplingParams", "Completion"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from batchinfer import llm

    return getattr(llm, name)
