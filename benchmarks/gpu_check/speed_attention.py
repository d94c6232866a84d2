"""Paged attention of Llama-3-8B's heads, beside a copy, a large product, and the vendor's on dense tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from gpu_check.cases import Case
from gpu_check.ceilings import Ceilings
from gpu_check.paged import paged
from gpu_check.session import Session, name_of
from gpu_check.timing import Call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from batchinfer.kernels.attention_triton import paged_attention
from batchinfer.kernels.kv_cache import MOST

TITLE = "Attention, 32 heads, 8 of keys, 128 numbers each"
COPIED = 75.0
"""Percent of a copy's rate that decoding is to reach with 16-bit keys and values."""
QUICKER = 1.7
"""Times as many keys a second that it is to reach with 8-bit ones."""
PREFILL = 55.0
"""Percent of the rate of a large bfloat16 product that prompts are to reach."""
F8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Step:
    """Sequences that have (context, new tokens) each; those that aims are about are `aimed` at."""

    name: str
    rows: tuple[tuple[int, int], ...]
    kv: tuple[torch.dtype, ...]
    deterministic: bool = False
    dense: bool = False  # all alike, so that the vendor's attention can do the same

    @property
    def keys(self) -> int:
        """Number of keys of all sequences."""
        return sum(context for context, _ in self.rows)

    @property
    def seen(self) -> int:
        """Pairs of a query and a key that it sees."""
        return sum(new * (context - new) + new * (new + 1) // 2 for context, new in self.rows)


def cases(session: Session) -> list[Case]:
    """Ours for every type of the cache, and the vendor's on dense tensors."""
    found: list[Case] = []
    for step in steps(session):
        found += [_case(session, step, kv) for kv in step.kv]
        if step.dense:
            found += [_dense(session, step, backend) for backend in _backends(session)]
    return found


def steps(session: Session) -> list[Step]:
    """Decoding alike, ragged and long, prompts, verification, and the fixed grid of a deterministic engine."""
    every = (session.dtype, F8, torch.int8) if session.gpu.has_float8 else (session.dtype, torch.int8)
    ragged = tuple((128 + 61 * (i * 37 % 64), 1) for i in range(256))
    device = [
        Step("decode 64 x 4096", ((4096, 1),) * 64, every, dense=True),
        Step("prefill 4 x 2048", ((2048, 2048),) * 4, every, dense=True),
        Step("decode 256, ragged from 128 to 4k", ragged, every),
        Step("decode 1 x 32768", ((32768, 1),), every),
        Step("verify 5 of 64 x 4096", ((4096, 5),) * 64, every[:2]),
        Step("decode 512 x 512", ((512, 1),) * 512, every[:2]),
        Step("prefill 2048 behind 6144", ((8192, 2048),), every[:1]),
        Step("decode 64 x 4096, deterministic", ((4096, 1),) * 64, every[:1], deterministic=True),
    ]
    smoke = [
        Step("decode", ((40, 1), (40, 1)), (*every[:1], torch.int8), dense=True),
        Step("prefill", ((20, 20),), every[:1], dense=True),
    ]
    found: list[Step] = session.pick(device, smoke)
    return found


def _heads(session: Session) -> tuple[int, int, int]:
    found: tuple[int, int, int] = session.pick((32, 8, 128), (4, 2, 16))
    return found


def _columns(session: Session, step: Step, kv: torch.dtype) -> dict[str, Any]:
    heads, kv_heads, head_dim = _heads(session)
    query = 2 * sum(new for _, new in step.rows) * heads * head_dim * session.dtype.itemsize
    a_key = head_dim * kv.itemsize + (4 if kv in MOST else 0)
    return {"nbytes": 2 * step.keys * kv_heads * a_key + query, "operations": 4.0 * step.seen * heads * head_dim}


def _case(session: Session, step: Step, kv: torch.dtype) -> Case:
    def make() -> Call:
        case = paged(session, step.rows, _heads(session), session.dtype, kv, known=False)
        plan = case.plan(session, None if step.deterministic else session.gpu.processors)
        return lambda: paged_attention(case.query, case.cache, plan, case.scale)

    return Case(
        TITLE, {"step": step.name, "by": "batchinfer", "cache": name_of(kv)}, make, **_columns(session, step, kv)
    )


def _backends(session: Session) -> tuple[SDPBackend, ...]:
    found: tuple[SDPBackend, ...] = session.pick(
        (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION), (SDPBackend.MATH,)
    )
    return found


def _dense(session: Session, step: Step, backend: SDPBackend) -> Case:
    context, new = step.rows[0]

    def make() -> Call:
        heads, kv_heads, head_dim = _heads(session)
        generator = session.generator()
        query, key, value = (
            torch.randn(len(step.rows), h, n, head_dim, generator=generator, device=session.device).to(session.dtype)
            for h, n in ((heads, new), (kv_heads, context), (kv_heads, context))
        )

        def call() -> object:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, is_causal=new > 1, enable_gqa=True)

        return call

    columns = {"step": step.name, "by": f"torch, {backend.name}", "cache": "dense"}
    return Case(TITLE, columns, make, **_columns(session, step, session.dtype), ours=False)


def judge(session: Session, ceiling: Ceilings) -> None:
    """Hold what was timed to the aims."""
    rows = {(row["step"], row["cache"]): row for row in session.rows(TITLE) if row["by"] == "batchinfer"}
    plain = name_of(session.dtype)
    decode, prefill = (step.name for step in steps(session)[:2])
    if (row := rows.get((decode, plain))) is not None:
        reached = 100 * row["GB/s"] * 1e9 / ceiling.bytes_per_second
        session.findings.aim(f"{decode}, {plain}: {COPIED:.0f} % of a copy", f"{reached:.0f} %", reached >= COPIED)
        for kv in ("fp8", "int8"):
            if (other := rows.get((decode, kv))) is not None:
                ratio = row["p50, us"] / other["p50, us"]
                aim = f"{decode}, {kv}: {QUICKER} times the keys a second of {plain}"
                session.findings.aim(aim, f"{ratio:.2f} times", ratio >= QUICKER)
    if (row := rows.get((prefill, plain))) is not None:
        reached = 100 * row["TFLOP/s"] * 1e12 / ceiling.bf16
        aim = f"{prefill}, {plain}: {PREFILL:.0f} % of a large bfloat16 product"
        session.findings.aim(aim, f"{reached:.0f} %", reached >= PREFILL)
