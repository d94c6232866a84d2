"""The CPU backend's operations against plain references, with ragged shapes and with NaN in the padding."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from batchinfer.engine.attention_inputs import TiledInputs
from batchinfer.formats.matrix import quantize_channels
from batchinfer.kernels import dispatch
from batchinfer.kernels.activation import silu_mul, silu_mul_quantize
from batchinfer.kernels.attention import attention
from batchinfer.kernels.backends import choose_backend
from batchinfer.kernels.kv_cache import KVCache, cache_rows, rotate
from batchinfer.kernels.linear import Linear
from batchinfer.kernels.linear_w4a16 import GROUPS, LinearW4A16
from batchinfer.kernels.linear_w8a8 import LinearW8A8
from batchinfer.kernels.norm import rms_norm, rms_norm_quantize
from batchinfer.kernels.rows import Rows, add_rows, quantize_rows
from batchinfer.models.batch import PromptChunk


def true_values(rows: Rows) -> Tensor:
    values = rows.values.double() - 128 if rows.values.dtype == torch.uint8 else rows.values.double()
    return values if rows.scale is None else values * rows.scale.double()


@pytest.mark.parametrize("columns", [1, 63, 500])
def test_rows_are_within_half_a_step_of_what_they_stand_for(columns: int) -> None:
    x = torch.randn(9, columns)
    x[4] = 0
    rows = quantize_rows(x.clone())
    assert rows.scale is not None
    error = (true_values(rows) - x.double()).abs()
    assert (error <= rows.scale.double() * 0.5000001).all()
    torch.testing.assert_close(rows.scale[:, 0] * 127, x.abs().amax(-1).clamp(min=1e-30), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_marked_and_alone(bad: float) -> None:
    x = torch.randn(8, 32)
    clean = quantize_rows(x.clone())
    x[3, 5] = bad
    rows = quantize_rows(x.clone())
    weight = LinearW8A8(*quantize_channels(torch.randn(16, 32)))
    assert not weight(rows).dense()[3].isfinite().any()
    others = [i for i in range(8) if i != 3]
    assert rows.values[others].equal(clean.values[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(8, 2, 63).to(dtype), torch.rand(63).to(dtype)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    expected = torch.nn.functional.rms_norm(x.double(), (63,), weight.double(), 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), expected, rtol=tolerance, atol=tolerance)


def test_norm_and_activation_with_quantization_are_the_plain_ones_rounded() -> None:
    x, weight = torch.randn(8, 500), torch.rand(500) + 0.5
    expected = torch.nn.functional.rms_norm(x.double(), (500,), weight.double(), 1e-5)
    got = rms_norm_quantize(x.clone(), weight, 1e-5)
    assert got.scale is not None
    assert ((true_values(got) - expected).abs() <= got.scale.double() * 0.501).all()

    h, scale = torch.randn(8, 126), torch.rand(8, 1) + 0.1
    gate, up = (h * scale).double().chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    for rows in (silu_mul_quantize(Rows(h.clone(), scale)), silu_mul_quantize(Rows(h * scale))):
        assert rows.scale is not None
        assert ((true_values(rows) - expected).abs() <= rows.scale.double() * 0.501).all()
    torch.testing.assert_close(silu_mul(h * scale).double(), expected, rtol=1e-5, atol=1e-6)


def test_residual() -> None:
    x, y, scale = torch.randn(8, 5), torch.randn(8, 5), torch.rand(8, 1)
    torch.testing.assert_close(add_rows(x.clone(), Rows(y, scale)), x + y * scale)
    assert add_rows(x.clone(), Rows(y)).equal(x + y)


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 500), (96, 64), (320, 33)])
@pytest.mark.parametrize("bias", [False, True])
def test_w8a8_is_the_exact_integer_product(
    path: str, n: int, k: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHINFER_KERNELS", path)
    x = torch.randint(1, 256, (40, k), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scale = 2.0 ** torch.randint(-6, 3, (n,)).float()  # powers of two: every product is exact
    row_scale = 2.0 ** torch.randint(-6, 3, (40, 1)).float()
    added = torch.randint(-5, 6, (n,)).float() if bias else None
    product = LinearW8A8(weight, scale, added)
    assert product.path == path
    exact = ((x.long() - 128) @ weight.t().long()).double() * scale * row_scale + (0 if added is None else added)
    for rows in (1, 7, 40):
        got = product(Rows(x[:rows], row_scale[:rows])).dense()
        assert got.double().equal(exact[:rows])


def test_w8a8_runs_the_vector_kernel() -> None:
    """oneDNN says which kernel it ran: a scalar reference would be thousands of times slower, and just as right."""
    code = (
        "import torch; from batchinfer.kernels.linear_w8a8 import LinearW8A8; from batchinfer.kernels.rows import Rows;"
        "p = LinearW8A8(torch.ones(96, 64, dtype=torch.int8), torch.ones(96));"
        "p(Rows(torch.ones(40, 64, dtype=torch.uint8), torch.ones(40, 1)))"
    )
    env = {**os.environ, "ONEDNN_VERBOSE": "1", "BATCHINFER_KERNELS": "auto"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    products = [line for line in out.splitlines() if ",exec,cpu,matmul," in line]
    assert products, out
    flags = Path("/proc/cpuinfo").read_text()
    kernels = {"amx_int8": "amx", "avx512_vnni": "avx512_core_vnni", "": "avx2"}
    expected = next(kernel for flag, kernel in kernels.items() if flag in flags)
    assert all("brg_matmul" in line and expected in line for line in products), products


def four_bits(n: int, k: int, group: int, zero_points: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(values, scale, zero point) as a checkpoint has them, scales in float16."""
    values = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    scale = (0.01 * (torch.rand(n, k // group) + 0.5)).half().float()
    zero_point = torch.randint(-8, 8, scale.shape) if zero_points else torch.zeros(scale.shape)
    return values, scale, zero_point.float()


def dequantized(values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    group = values.shape[1] // scale.shape[1]
    return (values.double() - zero_point.repeat_interleave(group, 1)) * scale.double().repeat_interleave(group, 1)


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize(("n", "groups"), [(16, 1), (48, 3), (80, 2), (1008, 5)])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_w4a16_is_the_product_of_what_the_weights_stand_for(
    path: str, n: int, groups: int, group: int, zero_points: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHINFER_KERNELS", path)
    weights = four_bits(n, groups * group, group, zero_points)
    added = torch.randn(n).bfloat16() if bias else None
    product = LinearW4A16(*weights, added)
    assert product.path == path
    x = torch.randn(63, groups * group).bfloat16()
    exact = x.double() @ dequantized(*weights).t()
    got = product(Rows(x)).values
    assert got.dtype == torch.bfloat16
    exact += 0 if added is None else added.double()
    # bfloat16 rounds to one part in 256 at most: each weight or its scale once, the product once, its bias once.
    error = (got.double() - exact).norm() / exact.norm()
    assert error < 1 / 256
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 16, 31):
        assert product(Rows(x[:rows])).values.equal(got[:rows]), rows
        assert product(Rows(x[-rows:])).values.equal(got[-rows:]), rows


def test_w4a16_is_exact_where_nothing_is_rounded() -> None:
    """Weights and rows of few bits, scales that are powers of two: all sums are whole numbers below 256."""
    values = torch.randint(-8, 8, (32, 64), dtype=torch.int8)
    scale, zero_point = 2.0 ** torch.randint(-3, 3, (32, 2)).float(), torch.randint(-8, 8, (32, 2)).float()
    x = torch.eye(64).bfloat16()
    assert (
        LinearW4A16(values, scale, zero_point)(Rows(x))
        .values.double()
        .t()
        .equal(dequantized(values, scale, zero_point))
    )


@pytest.mark.parametrize(("n", "k", "groups"), [(15, 64, 2), (16, 64, 4), (16, 96, 1), (1, 32, 1)])
def test_w4a16_of_sizes_that_it_does_not_take_is_refused(n: int, k: int, groups: int) -> None:
    with pytest.raises(ValueError, match=rf"4-bit weights \[{n}, {k}\] with groups of {k // groups}"):
        LinearW4A16(torch.zeros(n, k, dtype=torch.int8), torch.ones(n, groups), torch.zeros(n, groups))


def test_w4a16_holds_half_a_byte_a_weight() -> None:
    product = LinearW4A16(*four_bits(64, 512, 128, True))
    assert product.nbytes == 64 * 512 // 2 + 64 * 4 * 2 * 2
    assert product.operations_per_row == 2 * 64 * 512


def test_an_unknown_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHINFER_KERNELS", "fast")
    with pytest.raises(ValueError, match="'fast'"):
        dispatch.choose(("reference",))
    monkeypatch.setenv("BATCHINFER_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="only with TRITON_INTERPRET=1"):
        choose_backend("cpu", deterministic=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(96, 96), (320, 63), (1000, 384), (4096, 640)])
def test_a_row_of_a_product_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype, n: int, k: int) -> None:
    product = Linear(torch.randn(n, k).to(dtype))
    x = torch.randn(320, k).to(dtype)
    whole = product(Rows(x)).values
    for rows in (8, 16, 24, 64, 128, 256):
        assert product(Rows(x[:rows])).values.equal(whole[:rows])
    with pytest.raises(ValueError, match="7 rows; pad them to a multiple of 8"):
        product(Rows(x[:7]))


def test_rotation_keeps_scores_a_function_of_distance() -> None:
    angles = torch.outer(torch.arange(100).float(), torch.rand(32))
    x = torch.randn(1, 3, 64).expand(100, 3, 64)
    turned = rotate(x, angles.cos(), angles.sin())
    scores = torch.einsum("ihd,jhd->hij", turned.double(), turned.double())
    for distance in (0, 1, 50):
        diagonal = scores.diagonal(distance, 1, 2)
        torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One sequence in float64: q [t, heads, d] are its last t positions, k and v [n, kv_heads, d] all."""
    t, heads, d = q.shape
    n = len(k)
    k, v = (x.double().repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thd,nhd->htn", q.double(), k) * d**-0.5
    position, key = torch.arange(n - t, n)[:, None], torch.arange(n)
    seen = (key <= position) & (key > position - (window or n))
    return torch.einsum("htn,nhd->thd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("block_size", [8, 32, 64])
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("crowded", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 24), (4, 4, 64)])
def test_paged_attention_is_dense_attention(
    dtype: torch.dtype, block_size: int, window: int | None, crowded: bool, heads: int, kv_heads: int, head_dim: int
) -> None:
    """Shuffled block tables in a pool full of other values; prompts of awkward lengths, then one token of each."""
    rng = np.random.default_rng(0)
    lengths = [1, 15, 16, 17, 63, 64, 65, 150]
    keys, values = ([torch.randn(n, kv_heads, head_dim) for n in lengths] for _ in range(2))
    table = np.zeros((len(lengths), 192 // block_size), np.int64)
    needed = [-(-n // block_size) for n in lengths]
    pool = sum(needed) + 1 if crowded else 8 * sum(needed)
    free = rng.permutation(np.arange(1, pool))
    for i, count in enumerate(needed):
        table[i, :count], free = free[:count], free[count:]
    cache = KVCache(pool, kv_heads, block_size, head_dim, dtype)
    for leftover in (cache.key, cache.value):
        leftover.copy_(torch.randint(-100, 100, leftover.shape))
    for i, n in enumerate(lengths):
        slots = torch.from_numpy(table[i][np.arange(n) // block_size] * block_size + np.arange(n) % block_size)
        cache.store(keys[i], values[i], cache_rows(slots, kv_heads, block_size))

    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.int8: 3e-2}[dtype]
    rows = np.cumsum([0, *lengths])
    sequences, none = _Table(table, block_size), np.empty(0, np.int64)
    inputs = TiledInputs({window})
    prompts = inputs(sequences, [PromptChunk(i, 0, n, int(rows[i])) for i, n in enumerate(lengths)], none, none)
    query = torch.randn(rows[-1], heads, head_dim)
    out = attention(query, cache, prompts[window], head_dim**-0.5)
    decode = inputs(sequences, [], np.arange(len(lengths)), np.array(lengths) - 1)[window]
    assert isinstance(decode.decode.users[0].blocks, slice) == crowded or window is not None
    last = torch.from_numpy(rows[1:] - 1)
    out_last = attention(query[last], cache, decode, head_dim**-0.5)
    for i, n in enumerate(lengths):
        expected = dense_attention(query[rows[i] : rows[i] + n], keys[i], values[i], window)
        torch.testing.assert_close(out[rows[i] : rows[i] + n].double(), expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(out_last[i].double(), expected[-1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 24), (4, 4, 64), (3, 1, 16), (32, 8, 64)])
def test_a_query_has_the_same_bits_alone_and_with_others_at_its_blocks(
    dtype: torch.dtype, window: int | None, heads: int, kv_heads: int, head_dim: int
) -> None:
    """Sequences whose first blocks are the same ones, and up to five queries of each."""
    rng = np.random.default_rng(0)
    size, blocks = 16, 60
    cache = KVCache(blocks, kv_heads, size, head_dim, dtype)
    slots = torch.arange(blocks * size)
    data = torch.randn(2, blocks * size, kv_heads, head_dim)
    cache.store(data[0], data[1], cache_rows(slots, kv_heads, size))
    table = np.zeros((9, 8), np.int64)
    shared = [0, 6, 6, 6, 3, 3, 6, 1, 0]  # leading blocks that are those of the first
    table[0], free = np.arange(1, 9), iter(rng.permutation(np.arange(9, blocks)).tolist())
    for i, count in enumerate(shared[1:], 1):
        table[i, :count] = table[0, :count]
        table[i, count:] = [next(free) for _ in range(8 - count)] if count != 6 else [next(free), 0]
    first = np.array([90, 100, 99, 95, 70, 63, 106, 2, 0])
    count = np.array([5, 1, 5, 3, 1, 2, 4, 5, 1])
    places = np.repeat(np.arange(9), count)
    positions = np.concatenate([np.arange(p, p + c) for p, c in zip(first, count, strict=True)])
    query = torch.randn(len(places), heads, head_dim)
    inputs, sequences = TiledInputs({window}), _Table(table, size)
    batch = inputs(sequences, [], places, positions)[window]
    assert {users.queries.shape[1] for users in batch.decode.users} > {1}
    together = attention(query, cache, batch, head_dim**-0.5)
    for i in range(len(places)):
        alone = inputs(sequences, [], places[i : i + 1], positions[i : i + 1])[window]
        assert torch.equal(attention(query[i : i + 1], cache, alone, head_dim**-0.5)[0], together[i]), f"query {i}"


class _Table:
    def __init__(self, blocks: np.ndarray, block_size: int) -> None:
        self.blocks, self.block_size = blocks, block_size


def test_padding_writes_reach_nobody() -> None:
    cache = KVCache(3, 2, 8, 4, torch.float32)
    cache.store(torch.ones(5, 2, 4), torch.ones(5, 2, 4), cache_rows(torch.tensor([0, 0, 9, 17, 0]), 2, 8))
    assert cache.key[1:].sum() == 2 * 8
    assert cache.key[1, :, 1].sum() == cache.key[2, :, 1].sum() == 8
    cache.clear(torch.tensor([1]))
    assert cache.key[1].abs().sum() == 0 and cache.value[2].sum() == 8
