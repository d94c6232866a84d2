"""Multiples in which tokens are computed: prompt tiles for attention, padded rows for matrix products.

The row grain of a product is the number of which its input rows must be a multiple. This file imports no torch, so
that the job's planning can use it.
"""

TILE = 64
"""Number of positions of a prompt that attention computes together; the grid of tiles begins at position 0."""

MIN_ROWS = 8
"""The fewest rows of a product. With fewer, oneDNN and MKL take other kernels, which add in another order."""


def expert_size(rows: int, row_grain: int, least_rows: int) -> int:
    """Return the number of an expert's rows with padding: a multiple of `row_grain`, or a power of two below it.

    With padding they are `least_rows` or more. Most experts of a small step have one row or two.
    """
    if rows < row_grain:
        return max(least_rows, 1 << (rows - 1).bit_length())
    return -(-rows // row_grain) * row_grain


def padded_size(tokens: int, row_grain: int) -> int:
    """Return the number of a step's tokens with padding: a multiple of `row_grain`, or of 32 above 128 tokens.

    oneDNN makes a new kernel for every new number of rows, so there should be few different ones. With a row grain of
    1 there is no padding, because such products do not come from oneDNN.
    """
    grain = row_grain if tokens <= 128 or row_grain == 1 else 32
    return -(-tokens // grain) * grain


def padded_logits(rows: int, row_grain: int = MIN_ROWS) -> int:
    """Return the rows of logits, padding included, that a step computes for `rows` wanted ones."""
    return -(-rows // row_grain) * row_grain
