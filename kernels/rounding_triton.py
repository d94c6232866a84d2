"""Rounding a row of numbers to 8 bits, shared by several Triton kernels."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

_ROUND = tl.constexpr(1.5 * 2.0**23)  # adding and subtracting it rounds a small float32 to an integer, half to even


@triton.jit
def rounded(b_x):
    """Round float32 numbers below 2^22 to the nearest integer, half to even."""
    return (b_x + _ROUND) - _ROUND


@triton.jit
def rounded_to_float8(b_x):
    """Round float32 numbers below 464 to the nearest that float8e4nv holds, half to even.

    The conversion that follows is then exact, so every device stores the same. Triton's interpreter needs this too: its
    own conversion halves a number whose rounding carries into the exponent.
    """
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_last = (b_bits >> 20) & 1  # the last of the 3 mantissa bits (of 23) that are kept
    b_normal = ((b_bits + 0x7FFFF + b_last) & -0x100000).to(tl.float32, bitcast=True)
    # Below 2^-6 neighbouring float8 numbers are 2^-9 apart, as float32 numbers are around 1.5 * 2^14.
    b_small = (b_x + 1.5 * 2.0**14) - 1.5 * 2.0**14
    return tl.where(tl.abs(b_x) < 2.0**-6, b_small, b_normal)


@triton.jit
def quantized_row(b_x, dtype: tl.constexpr):
    """Quantize one float32 row to `dtype`, int8 or float8e4nv; return (`b_x` / scale, scale).

    A row with a value that is not finite gets a scale that is not finite.
    """
    most, nothing = extremes(b_x)
    scale = scale_of(most, nothing, dtype)
    return quantized(b_x, scale, dtype), scale


@triton.jit
def extremes(b_x):
    """Return the largest absolute value, without NaN, and a 0 that is NaN if any value is not finite."""
    return tl.max(tl.abs(b_x)), tl.sum(b_x * 0.0)


@triton.jit
def scale_of(most, nothing, dtype: tl.constexpr):
    """Return the scale of a row with these `extremes`."""
    largest: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    return tl.maximum(most, 1e-30) / largest + nothing


@triton.jit
def quantized(b_x, scale, dtype: tl.constexpr):
    """Return `b_x` / scale, rounded to `dtype`."""
    b_q = b_x * (1.0 / scale)
    b_q = rounded(b_q) if dtype == tl.int8 else rounded_to_float8(b_q)
    return b_q.to(dtype)
