"""Which implementation of an operation runs: by the device, or by `BATCHINFER_KERNELS`; never in silence."""

import os

PATHS = ("reference", "cpu", "triton")


def wanted() -> str:
    """`BATCHINFER_KERNELS`: auto, or the name of a path. A `ValueError` lists the names there are."""
    name = os.environ.get("BATCHINFER_KERNELS", "auto")
    if name not in ("auto", *PATHS):
        raise ValueError(f"BATCHINFER_KERNELS is {name!r}; it must be one of auto, {', '.join(PATHS)}")
    return name


def choose(available: tuple[str, ...]) -> str:
    """The path on the CPU, out of those that an operation has `available`: always "reference", perhaps "cpu".

    `BATCHINFER_KERNELS=auto` (the default) takes the processor's own path if there is one. Naming a path forces it; the
    plain reference is the processor's path of operations that have no faster one.
    """
    return "reference" if wanted() == "reference" or "cpu" not in available else "cpu"
