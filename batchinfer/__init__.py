"""batchinfer: offline batch inference over a table of prompts, on one device."""

from pathlib import Path

__version__ = "0.1.0"

# The folders `kernels`, `quantize` and `jobs` lie beside this one in a checkout, and inside it where it is installed.
_checkout = Path(__file__).parent.parent
if (_checkout / "pyproject.toml").is_file() and not (Path(__file__).parent / "kernels").exists():
    __path__.append(str(_checkout))
