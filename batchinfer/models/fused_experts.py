"""Experts in two tensors, as transformers holds them in memory. Most checkpoints have modules for each, not Qwen3.5.

`MODULE.experts.gate_up_proj` is [experts, 2 * inner, hidden], gate first; `MODULE.experts.down_proj` is
[experts, hidden, inner].
"""

import re
from collections.abc import Container
from typing import NamedTuple

_WEIGHT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<part>gate|up|down)_proj\.weight")


class ExpertPart(NamedTuple):
    """The place of one expert's weight in a tensor of all experts."""

    tensor: str
    expert: int
    half: int | None  # 0 or 1: the first or the second half of the rows; None: all

    def rows(self, count: int) -> slice:
        """Return which of the expert's `count` rows are the weight's."""
        return slice(0, count) if self.half is None else slice(self.half * count // 2, (self.half + 1) * count // 2)


def expert_part(weight: str, names: Container[str]) -> ExpertPart | None:
    """Return where the tensors of these `names` hold an expert's weight, or None if they hold it by its own name."""
    found = _WEIGHT.fullmatch(weight)
    if weight in names or found is None:
        return None
    down = found["part"] == "down"
    tensor = f"{found['experts']}.{'down_proj' if down else 'gate_up_proj'}"
    if tensor not in names:
        return None
    return ExpertPart(tensor, int(found["number"]), None if down else int(found["part"] == "up"))
