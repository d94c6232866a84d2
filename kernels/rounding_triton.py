"""What several Triton kernels do with a row of numbers before they store it in 8 bits."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

_ROUND = tl.constexpr(1.5 * 2.0**23)  # added to a small float32 and taken away, it rounds half to even


@triton.jit
def rounded(b_x):
    """float32 numbers below 2^22 to the nearest whole ones."""
    return (b_x + _ROUND) - _ROUND


@triton.jit
def rounded_to_float8(b_x):
    """float32 numbers below 464 to the nearest that float8e4nv holds, half to even; the conversion is then exact.

    So every device stores the same, and so does Triton's interpreter, which halves a number whose rounding carries.
    """
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_last = (b_bits >> 20) & 1  # of the three digits that stay of the 23
    b_normal = ((b_bits + 0x7FFFF + b_last) & -0x100000).to(tl.float32, bitcast=True)
    # Below 2^-6 steps are 2^-9, those of float32 around this number.
    b_small = (b_x + 1.5 * 2.0**14) - 1.5 * 2.0**14
    return tl.where(tl.abs(b_x) < 2.0**-6, b_small, b_normal)


@triton.jit
def quantized_row(b_x, dtype: tl.constexpr):
    """(`b_x` / scale in `dtype`, int8 or float8e4nv, scale) for one row of float32.

    A row with a value that is not finite gets a scale that is not finite.
    """
    most: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    # A maximum passes over NaN; the sum is 0, or NaN where something is not finite.
    scale = tl.maximum(tl.max(tl.abs(b_x)), 1e-30) / most + tl.sum(b_x * 0.0)
    b_q = b_x * (1.0 / scale)
    b_q = rounded(b_q) if dtype == tl.int8 else rounded_to_float8(b_q)
    return b_q.to(dtype), scale
