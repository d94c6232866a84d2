"""`Shipped`: a Triton kernel in a configuration that the product uses. A check compiles them all without a GPU."""

from dataclasses import dataclass
from typing import Any

from triton import JITFunction


@dataclass(frozen=True)
class Shipped:
    """A kernel with its argument types and constants. Each `*_triton.py` lists its own in `shipped(gpu)`."""

    name: str  # the kernel's name, and what distinguishes this configuration
    kernel: JITFunction[Any]
    types: dict[str, str]  # by argument, in the arguments' order, as Triton writes them: "*bf16", "i32", "fp32"
    constants: dict[str, Any]
    warps: int
    stages: int = 2
    product: str | None = None  # type multiplied on matrix units: "bf16", "fp16", "int8", "fp8"; None if it uses none
    product_rows: int = 0  # rows of that product's left operand
    prefetches: bool = False  # whether its loops must load ahead, where a GPU copies while it computes
    most_instructions: int | None = None  # that a warp may take for a turn of the innermost loop with the products
