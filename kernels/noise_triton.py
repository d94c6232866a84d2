"""Gumbel noise in Triton, keyed by (row seed, position, token id): that of `kernels/sampling.py`, in float32."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def minus_log_uniform(b_word):
    """Return -log(u) in float32, where u = (word + 0.5) / 2^32 for 32 random bits.

    For u near 1 it is computed from 1 - u, which float32 can hold more exactly.
    """
    b_low = -tl.log((b_word.to(tl.float32) + 0.5) * 2.0**-32)
    b_missing = ((b_word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.0**-32
    b_rest = 1.0 - b_missing
    b_high = tl.where(b_rest == 1.0, b_missing, tl.log(b_rest) * b_missing / (b_rest - 1.0))
    return tl.where(b_word < 0x80000000, b_low, b_high)


@triton.jit
def gumbel_of_four(i_counter, position, seed):
    """Return the noise [n, 4] of the token ids 4 * counter + 0, 1, 2 and 3."""
    b_0, b_1, b_2, b_3 = tl.philox(seed, i_counter.to(tl.uint32), position, 0 * i_counter, 0 * i_counter)
    b_words = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), [i_counter.shape[0], 4])
    return -tl.log(minus_log_uniform(b_words.to(tl.uint32)))


@triton.jit
def gumbel_of(i_token, position, seed):
    """Return the noise [n] of any n token ids, int32."""
    i_counter, i_word = i_token >> 2, i_token & 3
    b_0, b_1, b_2, b_3 = tl.philox(seed, i_counter.to(tl.uint32), position, 0 * i_counter, 0 * i_counter)
    b_word = tl.where(i_word < 2, tl.where(i_word == 0, b_0, b_1), tl.where(i_word == 2, b_2, b_3))
    return -tl.log(minus_log_uniform(b_word.to(tl.uint32)))
