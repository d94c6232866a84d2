"""`Shipped`: a Triton kernel in a configuration that is used, so that each can be compiled where there is no GPU."""

from dataclasses import dataclass
from typing import Any

from triton import JITFunction


@dataclass(frozen=True)
class Shipped:
    """One kernel with its types and constants; every `*_triton.py` lists its own in `shipped()`."""

    name: str  # of the kernel and what tells this configuration from the others
    kernel: JITFunction[Any]
    types: dict[str, str]  # by argument, as Triton writes them: "*bf16", "i32", "fp32"; in the order of the arguments
    constants: dict[str, Any]
    warps: int
    stages: int = 2
    product: str | None = None  # what it multiplies on matrix units: "bf16", "fp16", "int8", "fp8"; None if nothing
    product_rows: int = 0  # of the left operand of that product
