"""Kernels over rows, and sampling, against the bandwidth of a copy: in Llama-3-8B's sizes."""

from collections.abc import Callable
from functools import partial

import torch
from gpu_check.cases import Case
from gpu_check.right_sampling import sampling_batch
from gpu_check.session import Session, name_of
from gpu_check.timing import Call

from batchinfer.kernels.activation_triton import activate
from batchinfer.kernels.kv_cache import MOST, KVCache
from batchinfer.kernels.kv_cache_triton import rotate_and_store
from batchinfer.kernels.norm_triton import add_norm
from batchinfer.kernels.rows_triton import quantize_rows
from batchinfer.kernels.sampling import greedy
from batchinfer.kernels.sampling_triton import sample

ROWS = "Kernels over rows"
SAMPLING = "Sampling; bytes are those of the logits, once"
F8 = torch.float8_e4m3fn
FILTERS: dict[str, dict[str, list[float]]] = {
    "top-k and top-p": {"temperature": [0.8], "top_k": [50], "top_p": [0.95]},
    "top-p": {"temperature": [0.8], "top_p": [0.95]},
    "temperature": {"temperature": [0.8]},
    "greedy, by torch": {},
}


def cases(session: Session) -> list[Case]:
    """Sampling for one row and for many; kernels over few rows and many. Bytes are those moved at least."""
    found = [_sampling(session, rows, how) for rows in session.pick((1, 256), (3,)) for how in FILTERS]
    for rows in session.pick((64, 4096), (3,)):
        found += _kernels(session, rows)
    return found


def _sampling(session: Session, rows: int, how: str) -> Case:
    vocab = session.pick(128256, 100)

    def make() -> Call:
        logits = 3 * torch.randn(rows, vocab, generator=session.generator(), device=session.device)
        if not FILTERS[how]:
            return lambda: greedy(logits)
        batch = sampling_batch(rows, FILTERS[how], session.device)
        return lambda: sample(logits, batch, session.gpu)

    columns = {"rows": rows, "tokens": vocab, "kernel": f"sampling, {how}"}
    return Case(SAMPLING, columns, make, 4 * rows * vocab, ours=bool(FILTERS[how]))


def _kernels(session: Session, rows: int) -> list[Case]:
    hidden, inner = session.pick((4096, 14336), (64, 96))
    heads, kv_heads, head_dim = session.pick((32, 8, 128), (4, 2, 16))
    dtype, on = session.dtype, session.device
    size = dtype.itemsize

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=session.generator(), device=on).to(dtype)

    def case(kernel: str, kind: str, nbytes: float, make: Callable[[], Call]) -> Case:
        return Case(ROWS, {"kernel": kernel, "rows": rows, "type": kind}, make, nbytes)

    def norm(out: torch.dtype) -> Call:
        x, y, weight = noise(rows, hidden), torch.zeros(rows, hidden, dtype=dtype, device=on), noise(hidden)
        return lambda: add_norm(x, y, weight, 1e-5, out)  # y is nothing, so that the stream stays what it is

    def activation(out: torch.dtype) -> Call:
        gate_up = noise(rows, 2 * inner)
        return lambda: activate(gate_up, "silu", True, out)

    def quantization(out: torch.dtype) -> Call:
        x = noise(rows, hidden)
        return lambda: quantize_rows(x, out)

    def rotation(kv: torch.dtype) -> Call:
        qkv = noise(rows, (heads + 2 * kv_heads) * head_dim)
        cos, sin = torch.rand(2, rows, head_dim // 2, generator=session.generator(), device=on)
        slots = torch.randperm(rows, generator=session.generator(), device=on) + 32
        cache = KVCache(rows // 32 + 3, kv_heads, 32, head_dim, kv, on, values_by_column=True)
        return lambda: rotate_and_store(qkv, cache, heads, cos, sin, slots, None, False, 1e-5)

    found = []
    for out in (F8, torch.int8, dtype) if session.gpu.has_float8 else (torch.int8, dtype):
        kind, of = f"{name_of(dtype)} to {name_of(out)}", out.itemsize
        a_token = kv_heads * (head_dim * of + (4 if out in MOST else 0))
        moved = (2 * heads + 2 * kv_heads) * head_dim * size + 4 * head_dim + 2 * a_token
        found += [
            case("add_norm", kind, rows * hidden * (3 * size + of), partial(norm, out)),
            case("silu_mul", kind, rows * inner * (2 * size + of), partial(activation, out)),
            case("rotate_and_store", f"cache in {name_of(out)}", rows * moved, partial(rotation, out)),
        ]
        if out != dtype:
            found.append(case("quantize_rows", kind, rows * hidden * (size + of), partial(quantization, out)))
    return found
