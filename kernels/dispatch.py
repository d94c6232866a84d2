"""Choosing the implementation of an operation, by processor or by `BATCHINFER_KERNELS`. The report prints it."""

import os

PATHS = ("reference", "cpu", "triton")


def wanted() -> str:
    """Return the value of `BATCHINFER_KERNELS`: auto, or the name of a path. Raises `ValueError` for another name."""
    name = os.environ.get("BATCHINFER_KERNELS", "auto")
    if name not in ("auto", *PATHS):
        raise ValueError(f"BATCHINFER_KERNELS is {name!r}; it must be one of auto, {', '.join(PATHS)}")
    return name


def choose(available: tuple[str, ...]) -> str:
    """Choose the path on the CPU from the `available` ones, which always include "reference".

    `BATCHINFER_KERNELS=auto` (the default) takes the path "cpu" where it is available. `BATCHINFER_KERNELS=reference`
    forces the plain reference, which also serves operations that have no faster path.
    """
    return "reference" if wanted() == "reference" or "cpu" not in available else "cpu"
