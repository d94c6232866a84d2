"""batchinfer: offline batch inference over a table of prompts, on one device."""

from pathlib import Path

try:
    from batchinfer._version import __version__
except ModuleNotFoundError:  # a checkout that nothing was built from; building and installing write the file
    __version__ = "0.0+unknown"

__all__ = ["__version__"]

# The folders `kernels`, `quantize` and `jobs` lie beside this one in a checkout, and inside it where it is installed.
_checkout = Path(__file__).parent.parent
if (_checkout / "pyproject.toml").is_file() and not (Path(__file__).parent / "kernels").exists():
    __path__.append(str(_checkout))
