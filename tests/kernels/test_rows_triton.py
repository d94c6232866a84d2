"""Triton's norm, activation and quantization kernels in Triton's interpreter, against plain torch in float64.

The interpreter truncates instead of rounding to bfloat16, so types here are float32 and float16. It runs programs one
after the other, so these tests cannot find races.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, at import

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels import activation as plain
from batchinfer.kernels.activation_triton import activate
from batchinfer.kernels.kv_cache import KVCache, rotate
from batchinfer.kernels.kv_cache_triton import rotate_and_store, rotate_queries
from batchinfer.kernels.norm import LayerNorm, norm
from batchinfer.kernels.norm_triton import add_norm
from batchinfer.kernels.rounding_triton import rounded_to_float8
from batchinfer.kernels.rows import Rows

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
SHAPES = [(1, 64), (3, 100), (17, 63), (5, 1000), (2, 17_000)]


def check_quantized(found: Rows, expected: Tensor, out: torch.dtype) -> None:
    """Rounding keeps the order: what is found lies between the roundings of slightly less and slightly more."""
    assert found.scale is not None and found.values.dtype == out
    most, tolerance = 127 if out == torch.int8 else 448, TOLERANCE[torch.float32]
    scale = expected.abs().amax(-1, keepdim=True) / most
    torch.testing.assert_close(found.scale.double(), scale, rtol=tolerance, atol=0)

    def rounded(quotient: Tensor) -> Tensor:
        return quotient.round() if out == torch.int8 else quotient.to(out).double()

    less, more = rounded(expected / scale * (1 - tolerance)), rounded(expected / scale * (1 + tolerance))
    values = found.values.double()
    assert (values >= torch.minimum(less, more)).all() and (values <= torch.maximum(less, more)).all()


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("out", [torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_add_norm(rows: int, columns: int, out: torch.dtype, residual: bool, centered: bool) -> None:
    """The numbers lie around 1, or a mean that was not subtracted would not show."""
    dtype = out if out in TOLERANCE else torch.float32
    x, y = (torch.randn(rows, columns) + 1).to(dtype), torch.randn(rows, columns).to(dtype)
    weight, bias = (torch.rand(columns) + 0.5).to(dtype), torch.randn(columns).to(dtype)
    total = x + y if residual else x.clone()
    expected = F.rms_norm(total.double(), (columns,), weight.double(), 1e-5)
    if centered:
        expected = F.layer_norm(total.double(), (columns,), weight.double(), bias.double(), 1e-5)
    weights = LayerNorm(weight, bias) if centered else weight
    found = add_norm(x, y if residual else None, weights, 1e-5, out)
    assert x.equal(total), "the residual stream is the sum, to the bit"
    if out == dtype:
        assert found.scale is None
        torch.testing.assert_close(found.values.double(), expected, atol=TOLERANCE[out] * 4, rtol=TOLERANCE[out])
    else:
        check_quantized(found, expected, out)


@pytest.mark.parametrize("out", [torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(
    ("activation", "gated"),
    [("silu", True), ("gelu_tanh", True), ("gelu", False), ("relu2", False), ("clamped_swiglu", True)],
)
def test_activations(rows: int, columns: int, out: torch.dtype, activation: str, gated: bool) -> None:
    dtype = out if out in TOLERANCE else torch.float32
    x = (4 * torch.randn(rows, 2 * columns if gated else columns)).to(dtype)
    found = activate(x, activation, gated, out)
    expected = plain.activate(x.double(), activation, gated)
    if out == dtype:
        torch.testing.assert_close(found.values.double(), expected, atol=TOLERANCE[out] * 4, rtol=TOLERANCE[out])
    else:
        check_quantized(found, expected, out)


def test_float8_is_rounded_half_to_even() -> None:
    """Every number of the type, the midpoints between two, and the float32 numbers beside them all."""

    @triton.jit
    def kernel(p_x, p_out, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
        o = tl.arange(0, COUNT)
        tl.store(p_out + o, rounded_to_float8(tl.load(p_x + o)).to(tl.float8e4nv))

    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
    up, down = numbers.nextafter(torch.tensor(float("inf"))), numbers.nextafter(torch.tensor(float("-inf")))
    x = F.pad(torch.cat([up, down, numbers, -up, -down, -numbers]), (0, 2048 - 6 * len(numbers)))
    found = torch.full((2048,), float("nan")).to(torch.float8_e4m3fn)
    kernel[(1,)](x, found, COUNT=2048)
    assert found.float().equal(x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_stays_marked(bad: float) -> None:
    x = torch.randn(3, 40)
    x[1, 7] = bad
    scale = add_norm(x, None, torch.ones(40), 1e-5, torch.int8).scale
    assert scale is not None and scale.isfinite().flatten().tolist() == [True, False, True]


@pytest.mark.parametrize("normed_values", [False, True])
@pytest.mark.parametrize("normed", ["no", "rms", "layer", "layer by head", "rms by head", "rms last"])
@pytest.mark.parametrize("kv", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 64), (5, 5, 80), (3, 1, 96), (2, 1, 16)])
def test_rotate_and_store(
    heads: int, kv_heads: int, head_dim: int, kv: torch.dtype, normed: str, normed_values: bool
) -> None:
    tokens, block_size, last = 7, 16, normed.endswith("last")
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim) + 1
    cos, sin = torch.randn(2, tokens, head_dim // 2)
    shapes = [(n, head_dim) if normed.endswith("by head") else (head_dim,) for n in (heads, kv_heads)]
    of_query, of_key = (torch.rand(shape) + 0.5 for shape in shapes)
    norms = None if normed == "no" else (of_query, of_key)
    if normed.startswith("layer"):
        norms = (LayerNorm(of_query, torch.randn(shapes[0])), LayerNorm(of_key, torch.randn(shapes[1])))
    slots = torch.randperm(4 * block_size)[:tokens] + block_size
    cache = KVCache(6, kv_heads, block_size, head_dim, kv, values_by_column=True)
    poison = 99
    cache.key.fill_(poison)
    cache.value.fill_(poison)
    found = rotate_and_store(qkv, cache, heads, cos, sin, slots, norms, normed_values, 1e-5, last)
    query, key, value = qkv.view(tokens, -1, head_dim).split([heads, kv_heads, kv_heads], 1)
    if last:
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    if norms is not None:
        query, key = norm(query, norms[0], 1e-5), norm(key, norms[1], 1e-5)
    if normed_values:
        value = F.rms_norm(value, (head_dim,), None, 1e-5)
    if not last:
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    torch.testing.assert_close(found, query, atol=1e-5, rtol=1e-5)
    where = (slots // block_size, slice(None), slots % block_size)
    parts = ((cache.key, cache.key_scale, key), (cache.value, cache.value_scale, value))
    for pool, scales, expected in parts:
        stored = pool[where].float()
        if scales is not None:
            scale = scales[where][..., None]
            torch.testing.assert_close(scale, expected.abs().amax(-1, keepdim=True) / 127)
            assert ((stored * scale - expected).abs() <= 0.51 * scale).all()
        else:
            torch.testing.assert_close(stored, expected, atol=TOLERANCE[kv] * 4, rtol=TOLERANCE[kv])
        pool[where] = poison
        assert (pool == poison).all(), "and nothing else was written"


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [(6, 64), (5, 80), (1, 16)])
def test_rotate_queries_alone(heads: int, head_dim: int, normed: bool) -> None:
    query = torch.randn(7, heads * head_dim)
    cos, sin = torch.randn(2, 7, head_dim // 2)
    weight = torch.rand(head_dim) + 0.5 if normed else None
    by_head = query.view(7, heads, head_dim)
    expected = by_head if weight is None else F.rms_norm(by_head, (head_dim,), weight, 1e-5)
    found = rotate_queries(query, heads, cos, sin, weight, 1e-5)
    torch.testing.assert_close(found, rotate(expected, cos, sin), atol=1e-5, rtol=1e-5)
