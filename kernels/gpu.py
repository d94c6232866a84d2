"""`Gpu`: what kernels must know of a GPU to choose their tiles; and the GPUs that are too old. Free of torch."""

from dataclasses import dataclass
from functools import cached_property

LEAST_CAPABILITY = (8, 0)
"""Older GPUs have no bfloat16, too little shared memory, and no int8 product that Triton compiles."""

LEAST_WITH_FLOAT8 = (8, 9)


@dataclass(frozen=True)
class Gpu:
    """A GPU's limits. `shared_bytes` is the most shared memory that one program may take."""

    name: str
    capability: tuple[int, int]
    processors: int  # multiprocessors
    shared_bytes: int

    @cached_property
    def has_float8(self) -> bool:
        """Whether its matrix units multiply float8."""
        return self.capability >= LEAST_WITH_FLOAT8

    @property
    def eight_bits(self) -> frozenset[str]:
        """The types of 8-bit rows that it multiplies."""
        return eight_bits(self.capability)


INTERPRETED = Gpu("Triton's interpreter", (9, 0), 4, 227 << 10)
"""Stands for the GPU in Triton's interpreter. Four multiprocessors are enough that small tests split their work."""


def eight_bits(capability: tuple[int, int] | None) -> frozenset[str]:
    """Return the types of 8-bit rows that a GPU multiplies; all of them if its capability is not known."""
    return frozenset({"int8", "fp8"} if capability is None or capability >= LEAST_WITH_FLOAT8 else {"int8"})


def refuse_old(name: str, capability: tuple[int, int]) -> None:
    """Raise `ValueError` if the GPU `name` has too low a compute capability."""
    if capability < LEAST_CAPABILITY:
        has, least = (".".join(map(str, numbers)) for numbers in (capability, LEAST_CAPABILITY))
        raise ValueError(
            f"the GPU {name} has compute capability {has}, and the kernels need {least} or more; take --device cpu"
        )
