"""Kernels over rows against plain torch in float64: norm, activation, quantization; rotation into the cache."""

from itertools import product

import torch
from gpu_check.compare import Errors, check_quantized, poisoned
from gpu_check.session import Session, name_of
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.norm import NormWeights

TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
EPS = 1e-5


def run(session: Session) -> None:
    """Norm with and without a residual, activation, quantization: to their own type and to 8 bits."""
    errors = Errors(session)
    shapes = session.pick([(1, 64), (17, 63), (5, 1000), (70, 4096), (3, 14336)], [(1, 64), (3, 63)])
    for dtype, (rows, columns) in session.within_time(product(session.dtypes, shapes)):
        session.say(f"{name_of(dtype)} [{rows}, {columns}]")
        for out in (dtype, *EIGHT_BITS):
            with session.case(f"rows in {name_of(dtype)} [{rows}, {columns}] to {name_of(out)}"), poisoned():
                _norm(session, errors, dtype, out, rows, columns)
                _activation(session, errors, dtype, out, rows, columns)
                if out != dtype:
                    _quantization(session, errors, dtype, out, rows, columns)
    with session.case("rows that are not finite"):
        _not_finite(session)
    errors.write()


def _norm(session: Session, errors: Errors, dtype: torch.dtype, out: torch.dtype, rows: int, columns: int) -> None:
    from batchinfer.kernels.norm import LayerNorm
    from batchinfer.kernels.norm_triton import add_norm

    for residual, centered in product((True, False), repeat=2):
        x, y = (_random(session, dtype, rows, columns, seed=seed) for seed in (1, 2))
        weight, bias = _random(session, dtype, columns, seed=3).abs() + 0.5, _random(session, dtype, columns, seed=7)
        total = x + y if residual else x.clone()
        expected = F.rms_norm(total.double(), (columns,), weight.double(), EPS)
        if centered:
            expected = F.layer_norm(total.double(), (columns,), weight.double(), bias.double(), EPS)
        found = add_norm(x, y if residual else None, LayerNorm(weight, bias) if centered else weight, EPS, out)
        name = "add_norm, LayerNorm" if centered else "add_norm"
        errors.same(f"{name}, the sum", name_of(dtype), x, total)
        if out == dtype:
            assert found.scale is None
            errors.close(name, name_of(dtype), found.values, expected, TOLERANCE[dtype])
        else:
            check_quantized(errors, f"{name} of {name_of(dtype)}", found.values, found.scale, expected)


def _activation(
    session: Session, errors: Errors, dtype: torch.dtype, out: torch.dtype, rows: int, columns: int
) -> None:
    from batchinfer.kernels.activation import activate as exact
    from batchinfer.kernels.activation_triton import activate

    for activation, gated in (("silu", True), ("gelu_tanh", True), ("gelu", False), ("relu2", False)):
        x = 3 * _random(session, dtype, rows, 2 * columns if gated else columns, seed=4)
        found, expected = activate(x, activation, gated, out), exact(x.double(), activation, gated)
        if out == dtype:
            errors.close(activation, name_of(dtype), found.values, expected, TOLERANCE[dtype])
        else:
            check_quantized(errors, f"{activation} of {name_of(dtype)}", found.values, found.scale, expected)


def _quantization(
    session: Session, errors: Errors, dtype: torch.dtype, out: torch.dtype, rows: int, columns: int
) -> None:
    from batchinfer.kernels.rows_triton import quantize_rows

    x = _random(session, dtype, rows, columns, seed=5)
    found = quantize_rows(x, out)
    check_quantized(errors, f"quantize_rows of {name_of(dtype)}", found.values, found.scale, x)


def _not_finite(session: Session) -> None:
    from batchinfer.kernels.norm_triton import add_norm

    for bad in (float("nan"), float("inf"), float("-inf")):
        x = _random(session, session.dtype, 3, 40, seed=6)
        x[1, 7] = bad
        scale = add_norm(x, None, torch.ones_like(x[0]), EPS, torch.int8).scale
        assert scale is not None and scale.isfinite().flatten().tolist() == [True, False, True], bad


def run_rotation(session: Session) -> None:
    """Queries rotated, keys and values in their places, in every type of the cache; and nothing else written."""
    errors = Errors(session)
    heads = session.pick([(6, 2, 64), (5, 5, 80), (3, 1, 96), (8, 2, 128), (4, 1, 256)], [(3, 1, 16)])
    for dtype, (q_heads, kv_heads, head_dim), normed in session.within_time(
        product(session.dtypes, heads, ("no", "rms", "layer by head", "rms last"))
    ):
        if dtype != session.dtypes[0] and head_dim not in (16, 80, 128):
            continue  # one type in all sizes, all types in some
        for kv in (dtype, *EIGHT_BITS):
            if session.smoke and kv == torch.float8_e4m3fn:
                continue  # the interpreter truncates where it rounds to float8
            name = f"rotate_and_store, {head_dim} in {name_of(dtype)}, cache {name_of(kv)}, normed {normed}"
            with session.case(name), poisoned():
                _rotation(session, errors, dtype, kv, q_heads, kv_heads, head_dim, normed)
        session.say(f"heads of {head_dim} in {name_of(dtype)}")
    errors.write()


def _rotation(
    session: Session,
    errors: Errors,
    dtype: torch.dtype,
    kv: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    normed: str,
) -> None:
    from batchinfer.kernels.kv_cache import KVCache
    from batchinfer.kernels.kv_cache_triton import rotate_and_store
    from batchinfer.kernels.norm import LayerNorm
    from batchinfer.kernels.ragged_attention import _positions as stored_positions

    tokens, block_size = session.pick(70, 7), 16
    qkv = _random(session, dtype, tokens, (heads + 2 * kv_heads) * head_dim, seed=1)
    angles = 6 * torch.rand(tokens, head_dim // 2, generator=session.generator(2), device=session.device)
    norms = None
    if normed == "layer by head":
        norms = tuple(
            LayerNorm(*(_random(session, dtype, count, head_dim, seed=seed) for seed in (3, 4)))
            for count in (heads, kv_heads)
        )
    elif normed != "no":
        norms = tuple(_random(session, dtype, head_dim, seed=seed).abs() + 0.5 for seed in (3, 4))
    slots = torch.randperm(8 * block_size, generator=session.generator(5), device=session.device)[:tokens] + block_size
    cache = KVCache(10, kv_heads, block_size, head_dim, kv, session.device, values_by_column=True)
    untouched = 0x11
    for pool in (cache.key, cache.value):
        pool.view(torch.uint8).fill_(untouched)
    last = normed == "rms last"
    found = rotate_and_store(qkv, cache, heads, angles.cos(), angles.sin(), slots, norms, False, EPS, last)

    query, key, value = qkv.double().view(tokens, -1, head_dim).split([heads, kv_heads, kv_heads], 1)
    if normed == "rms last":
        query, key = (_rotated(x, angles).to(dtype).double() for x in (query, key))
    if norms is not None:
        # In the stream's own type, as it is where the norm is an operation of its own.
        query, key = (_normed(x, weights).to(dtype).double() for x, weights in zip((query, key), norms, strict=True))
    if normed != "rms last":
        query, key = _rotated(query, angles), _rotated(key, angles)
    errors.close("rotate_and_store, queries", name_of(dtype), found, query, 2 * TOLERANCE[dtype])
    kind, size = f"{name_of(dtype)}, cache {name_of(kv)}", 10 * block_size
    every = torch.arange(10, device=session.device)
    for part, scales, expected in (("key", cache.key_scale, key), ("value", cache.value_scale, value)):
        stored = stored_positions(cache, every, part, size, torch.float64)[slots]
        if scales is None:
            errors.close(f"rotate_and_store, {part}s", kind, stored, expected, 2 * TOLERANCE[dtype])
            continue
        # Off by half a step of the type, and by what the stream's type rounds before.
        tolerance = (0.02 if kv == torch.int8 else 0.035) + TOLERANCE[dtype]
        errors.close(f"rotate_and_store, {part}s", kind, stored, expected, tolerance)
        exact = expected.to(dtype).double().abs().amax(-1) / (127 if kv == torch.int8 else 448)
        found_scales = scales[slots // block_size, :, slots % block_size]
        errors.close(f"rotate_and_store, scales of {part}s", kind, found_scales, exact, 3 * TOLERANCE[dtype])
    cache.clear_slots(slots)
    for pool in (cache.key, cache.value):
        left = pool.view(torch.uint8)
        written = left != untouched
        assert not bool(left[written].any()), "something else was written"
        assert int(written.sum()) == tokens * kv_heads * head_dim * kv.itemsize, "something else was written"


def _normed(x: Tensor, weights: NormWeights) -> Tensor:
    if isinstance(weights, Tensor):
        return F.rms_norm(x, x.shape[-1:], weights.double(), EPS)
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * weights.weight.double() + weights.bias.double()


def _rotated(x_THd: Tensor, angles_Td: Tensor) -> Tensor:
    a, b = x_THd.chunk(2, -1)
    cos, sin = angles_Td.cos().double()[:, None], angles_Td.sin().double()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _random(session: Session, dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=session.generator(seed), device=session.device).to(dtype)
