"""`AttentionShape`: what a step's inputs to attention depend on, beside its sequences. This file imports no torch."""

from typing import NamedTuple


class AttentionShape(NamedTuple):
    """The shape of a layer's attention. Layers of one shape share a step's inputs to attention."""

    window: int | None  # number of positions that a token sees, its own included; None: all up to its own
    heads: int
    kv_heads: int
    head_dim: int
