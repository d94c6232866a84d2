"""In which multiples rows come: prompts on a grid of tiles, products by some rows at a time. Free of torch."""

TILE = 64
"""Positions of a prompt that are computed together; the grid begins at the sequence's start."""

MIN_ROWS = 8
"""Below this many rows oneDNN and MKL take other kernels (other sums); from here up a row's bits stay the same."""


def padded_size(tokens: int, row_grain: int) -> int:
    """Tokens of a step with padding: few different sizes, for each costs oneDNN a new kernel.

    Products that take any number of rows do not come from there.
    """
    grain = row_grain if tokens <= 128 or row_grain == 1 else 32
    return -(-tokens // grain) * grain
