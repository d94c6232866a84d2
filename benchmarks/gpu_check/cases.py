"""`Case`: something that is timed, with the bytes and the operations that it needs at least."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpu_check.timing import Call


@dataclass(frozen=True)
class Case:
    """`make` makes its tensors and returns the call that is timed."""

    table: str
    columns: dict[str, Any]  # what distinguishes it from the other cases of its table
    make: Callable[[], Call]
    nbytes: float  # that it must move
    operations: float = 0.0
    unit: str = "bf16"  # what multiplies: bf16, fp8 or int8
    ours: bool = True  # False: the vendor's, which may refuse

    @property
    def name(self) -> str:
        """The columns in a line."""
        return f"{self.table}: {', '.join(str(value) for value in self.columns.values())}"
