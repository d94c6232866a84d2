"""Kernels over rows, and sampling, against the bandwidth of a copy: in Llama-3-8B's sizes."""

from collections.abc import Callable

import torch
from gpu_check import ceilings
from gpu_check.engines import release
from gpu_check.right_sampling import sampling_batch
from gpu_check.session import Session, name_of
from gpu_check.timing import Clock

from batchinfer.kernels.activation_triton import silu_mul
from batchinfer.kernels.kv_cache import MOST, KVCache
from batchinfer.kernels.kv_cache_triton import rotate_and_store
from batchinfer.kernels.norm_triton import add_norm
from batchinfer.kernels.rows_triton import quantize_rows
from batchinfer.kernels.sampling import greedy
from batchinfer.kernels.sampling_triton import sample

F8 = torch.float8_e4m3fn
Call = Callable[[], object]


def run(session: Session) -> None:
    """A row of the table for each kernel, type and number of rows; bytes are those that it must move at least."""
    ceiling, clock = ceilings.known(session), Clock(session)
    for rows in session.pick((64, 4096), (3,)):
        for name, kind, nbytes, call in _kernels(session, rows):
            with session.case(f"{name}, {rows} rows, {kind}"):
                columns = ceiling.columns(clock(call), nbytes)
                session.row("Kernels over rows", kernel=name, rows=rows, type=kind, **columns)
        release(session)
        session.say(f"{rows} rows")
    vocab, rows = session.pick((128256, 64), (100, 3))
    logits = 3 * torch.randn(rows, vocab, generator=session.generator(), device=session.device)
    for name, columns in {
        "greedy, by torch": {},
        "temperature": {"temperature": [0.8]},
        "top-p": {"temperature": [0.8], "top_p": [0.95]},
        "top-k and top-p": {"temperature": [0.8], "top_k": [50], "top_p": [0.95]},
    }.items():
        with session.case(f"sampling, {name}"):
            batch = sampling_batch(rows, columns, session.device)
            call: Call = (lambda: greedy(logits)) if not columns else (lambda batch=batch: sample(logits, batch))
            figures = ceiling.columns(clock(call), logits.nbytes)
            session.row("Sampling; bytes are those of the logits, once", rows=rows, tokens=vocab, how=name, **figures)
    session.say("sampling")


def _kernels(session: Session, rows: int) -> list[tuple[str, str, int, Call]]:
    """(kernel, type, bytes, call)."""
    hidden, inner = session.pick((4096, 14336), (64, 96))
    heads, kv_heads, head_dim = session.pick((32, 8, 128), (4, 2, 16))
    dtype, on, generator = session.dtype, session.device, session.generator()

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=on).to(dtype)

    size = dtype.itemsize
    x, y, weight, gate_up = noise(rows, hidden), noise(rows, hidden), noise(hidden), noise(rows, 2 * inner)
    # y is nothing, so that the stream stays what it is however often it is added.
    y.mul_(0)
    found: list[tuple[str, str, int, Call]] = []
    for out in (dtype, F8, torch.int8):
        kind, of = f"{name_of(dtype)} to {name_of(out)}", out.itemsize
        found.append(
            (
                "add_norm",
                kind,
                rows * hidden * (3 * size + of),
                lambda out=out: add_norm(x, y, weight, 1e-5, out),
            )
        )
        found.append(("silu_mul", kind, rows * inner * (2 * size + of), lambda out=out: silu_mul(gate_up, out)))
        if out != dtype:
            found.append(("quantize_rows", kind, rows * hidden * (size + of), lambda out=out: quantize_rows(x, out)))
    qkv = noise(rows, (heads + 2 * kv_heads) * head_dim)
    cos, sin = torch.rand(2, rows, head_dim // 2, generator=generator, device=on)
    slots = torch.randperm(rows, device=on) + 32
    for kv in (dtype, torch.int8, F8):
        cache = KVCache(rows // 32 + 3, kv_heads, 32, head_dim, kv, on, values_by_column=True)
        stored = 2 * rows * kv_heads * (head_dim * kv.itemsize + (4 if kv in MOST else 0))
        nbytes = qkv.nbytes + rows * heads * head_dim * size + stored + cos.nbytes + sin.nbytes

        def call(cache: KVCache = cache) -> object:
            return rotate_and_store(qkv, cache, heads, cos, sin, slots, None, 1e-5)

        found.append(("rotate_and_store", f"{name_of(dtype)}, cache {name_of(kv)}", nbytes, call))
    return found
