"""Which implementation of an operation runs: by the device, or by `BATCHINFER_KERNELS`; never in silence."""

import os

PATHS = ("reference", "cpu", "triton")
chosen: dict[str, str] = {}
"""What was chosen in this process, by operation: the report prints it."""


def choose(op: str, device: str, available: tuple[str, ...]) -> str:
    """The path for `op` on `device` ("cpu" or "cuda"), out of the `available` ones, which always hold "reference".

    `BATCHINFER_KERNELS=auto` (the default) takes the device's own path if there is one. Naming a path forces it; a
    `ValueError` says so if this operation has none of that name.
    """
    wanted = os.environ.get("BATCHINFER_KERNELS", "auto")
    if wanted not in ("auto", *PATHS):
        raise ValueError(f"BATCHINFER_KERNELS is {wanted!r}; it must be one of auto, {', '.join(PATHS)}")
    if wanted == "auto":
        native = "triton" if device == "cuda" else "cpu"
        path = native if native in available else "reference"
    elif wanted in available:
        path = wanted
    elif wanted == "cpu":
        path = "reference"  # the plain reference is the CPU path of operations that have no faster one
    else:
        raise ValueError(f"BATCHINFER_KERNELS={wanted} has no {op} on {device}; available: {', '.join(available)}")
    chosen[op] = path
    return path
