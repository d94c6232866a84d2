"""What a tool watches: small cases of each kernel, or cases of those that are timed."""

import json
import time
from collections.abc import Callable, Iterator
from itertools import product

import torch
from gpu_check import speed
from gpu_check.paged import paged
from gpu_check.right_sampling import sampling_batch
from gpu_check.session import Session, name_of
from torch import Tensor

from batchinfer.kernels.activation_triton import activate
from batchinfer.kernels.attention_triton import paged_attention
from batchinfer.kernels.linear_triton import linear
from batchinfer.kernels.linear_w8a8_triton import linear_w8a8
from batchinfer.kernels.norm_triton import add_norm
from batchinfer.kernels.products_triton import FourBitProduct
from batchinfer.kernels.rows import Rows
from batchinfer.kernels.rows_triton import quantize_rows
from batchinfer.kernels.sampling_triton import sample

CALLS = 2
"""Number of calls of a case that is timed: the first compiles."""


def run_cases(smoke: bool, names: str) -> int:
    """Run "small", or cases by their names, a JSON list. Say each that is done; the exit code."""
    session = Session(smoke, "watched", time.monotonic() + 600)
    for name in json.loads(names):
        if name != "small":
            speed.call(session, name, CALLS)
            continue
        for case, call in small_cases(session):
            out = call()
            assert bool(out.double().isfinite().all()), f"{case}: not all numbers are finite"
            print(f"case {case}", flush=True)
    session.synchronize()
    return 0


def small_cases(session: Session) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Each kernel in a size that a tool gets through soon; the first ones matter most."""
    dtype, on = session.dtype, session.device
    eight = (torch.int8, torch.float8_e4m3fn) if session.gpu.has_float8 else (torch.int8,)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=session.generator(sum(shape)), device=on).to(dtype)

    heads = session.pick((8, 2, 128), (2, 1, 16))
    shapes = session.pick({"few": ((70, 1), (33, 2)), "many": ((150, 100),)}, {"few": ((40, 1),)})
    for kv, (which, rows) in product((dtype, *eight), shapes.items()):
        if session.smoke and kv == torch.float8_e4m3fn:
            continue  # the interpreter truncates where it rounds to float8
        case = paged(session, rows, heads, dtype, kv, known=False)
        for processors in (session.gpu.processors, None):
            plan = case.plan(session, processors)
            fixed = "" if processors else ", deterministic"
            yield (
                f"attention, {which}, cache in {name_of(kv)}{fixed}",
                lambda case=case, plan=plan: paged_attention(case.query, case.cache, plan, case.scale),
            )
    n, k = session.pick((96, 256), (24, 32))
    for rows in session.pick((3, 70), (3,)):
        x, weight = noise(rows, k), noise(n, k)
        numbers = (2 * noise(n, k).float()).round_().clamp_(-8, 7).to(torch.int8)
        scale = torch.full((n, k // 32), 0.1, device=on)
        for zeros in (None, torch.ones_like(scale)):
            four = FourBitProduct(numbers, scale, zeros, None, dtype, session.gpu, deterministic=False)
            yield f"w4a16, {rows} rows", lambda four=four, x=x: four(Rows(x)).values
        yield f"linear, {rows} rows", lambda x=x, weight=weight: linear(x, weight)
        for kind in eight:
            left, right = (quantize_rows(t, kind) for t in (x, weight))
            assert right.scale is not None
            scales = right.scale.flatten()
            yield (
                f"w8a8 {name_of(kind)}, {rows} rows",
                lambda left=left, right=right, scales=scales: linear_w8a8(
                    left, right.values, scales, None, dtype, session.gpu
                ),
            )
    x, gate_up, ones = noise(3, 96), noise(3, 192), torch.ones(96, dtype=dtype, device=on)
    for out in (dtype, *eight):
        yield f"add_norm to {name_of(out)}", lambda out=out: add_norm(x.clone(), x, ones, 1e-5, out).values
        yield f"silu_mul to {name_of(out)}", lambda out=out: activate(gate_up, "silu", True, out).values
    batch = sampling_batch(2, {"temperature": [0.8], "top_k": [5], "top_p": [0.9]}, on)
    yield "sampling", lambda: sample(noise(2, 5000).float(), batch, session.gpu)[0]
