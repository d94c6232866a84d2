"""`FusedExperts`: how checkpoints hold the matrices of all experts of a layer in two tensors.

Layers describe each expert by itself, with modules `MODULE.experts.N.gate_proj`, `up_proj` and `down_proj`, as
checkpoints in few bits hold them. Where a checkpoint has no tensors of these names, parts of the fused ones are read.
This module does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

_ENDS = {".weight": "", ".bias": "_bias", "_blocks": "_blocks", "_scales": "_scales"}
"""The ends of an expert's tensors' names and of those of fused tensors; blocks and scales are those of MXFP4."""
_OF_ONE = re.compile(
    r"(?P<layer>.+)\.\w+\.experts\.(?P<expert>\d+)\.(?P<matrix>gate|up|down)_proj(?P<end>\.weight|\.bias|_blocks|_scales)"
)


class ExpertPart(NamedTuple):
    """The place of one expert's tensor in a tensor of all experts."""

    tensor: str
    expert: int
    half: int | None  # which half of the expert's rows it is, 0 or 1; None: all of them
    alternating: bool  # whether the rows of both halves alternate
    transposed: bool

    def of(self, expert: Tensor) -> Tensor:
        """Return the part of what the tensor holds of its expert: [rows, ...], or [columns, rows] if transposed.

        Raises `RuntimeError` or `IndexError` for a tensor that has no such part.
        """
        rows = expert.t() if self.transposed else expert
        if self.half is None:
            return rows
        return rows[self.half :: 2] if self.alternating else rows.chunk(2)[self.half]


@dataclass(frozen=True)
class FusedExperts:
    """The names of the two tensors, without the layer's prefix, and their form: by default that of Qwen3.5.

    Weights are [experts, rows, columns], and gate and up lie in one of them.
    """

    gate_up: str = "mlp.experts.gate_up_proj"
    down: str = "mlp.experts.down_proj"
    alternating: bool = False  # the rows of gate and up alternate; else those of up follow those of gate
    transposed: bool = False  # weights are [experts, columns, rows]
    only_form: bool = False  # whether transformers reads this family's experts in no other form

    def part(self, name: str, names: Container[str]) -> ExpertPart | None:
        """Return where the tensors of these `names` hold an expert's tensor, or None if not in one of all experts."""
        found = _OF_ONE.fullmatch(name)
        if name in names or found is None:
            return None
        matrix, end = found["matrix"], found["end"]
        tensor = f"{found['layer']}.{self.down if matrix == 'down' else self.gate_up}{_ENDS[end]}"
        if tensor not in names:
            return None
        half = None if matrix == "down" else int(matrix == "up")
        return ExpertPart(tensor, int(found["expert"]), half, self.alternating, self.transposed and end == ".weight")

    def around(self, tensor: str) -> list[tuple[str, str]]:
        """Return what stands before and behind an expert's number in the names of all that a fused tensor holds.

        The list is empty for a tensor that is not fused.
        """
        for fused, matrices in ((self.gate_up, ("gate", "up")), (self.down, ("down",))):
            for end, stored in _ENDS.items():
                if tensor.endswith(f".{fused}{stored}"):
                    module = f"{tensor.removesuffix(f'{fused}{stored}')}{fused.partition('.')[0]}"
                    return [(f"{module}.experts.", f".{matrix}_proj{end}") for matrix in matrices]
        return []


QWEN_3_5 = FusedExperts()
