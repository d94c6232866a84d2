"""Paged attention against torch's own in float64: every kind of step, every type of the cache, every size of heads."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from gpu_check.compare import Errors, poisoned
from gpu_check.paged import Paged, paged
from gpu_check.session import Session, name_of

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
F8 = torch.float8_e4m3fn
Rows = Sequence[tuple[int, int]]
# (context, new tokens): decoding, drafts, whole prompts and pieces of them.
MIXED = [(1, 1), (15, 15), (16, 1), (17, 9), (63, 40), (64, 2), (130, 1), (100, 5), (1500, 1), (700, 300), (2100, 9)]
VERIFIED = [(300 + 77 * new, new) for new in range(2, 10)] + [(new, new) for new in range(2, 10)]
DECODED = [(1 + 97 * i, 1) for i in range(24)]
KINDS: dict[str, Rows] = {"mixed": MIXED, "verified": VERIFIED, "decoded": DECODED}
FEW: dict[str, Rows] = {"mixed": [(9, 9), (17, 9), (140, 1)], "verified": [(40, 3)], "decoded": [(33, 1)]}


def run_small_heads(session: Session) -> None:
    """Heads of 64 and of 80."""
    _sizes(session, session.pick((64, 80), (16,)))


def run_usual_heads(session: Session) -> None:
    """Heads of 96 and of 128."""
    _sizes(session, session.pick((128, 96), (24,)))


def run_large_heads(session: Session) -> None:
    """Heads of 256, and other numbers of them than four to a head of keys."""
    if not session.smoke:
        _sizes(session, (256,))
    errors = Errors(session)
    for heads in session.within_time(session.pick([(5, 5, 64), (7, 1, 128), (8, 1, 128), (71, 1, 64)], [(3, 3, 16)])):
        for kind, rows in session.pick(KINDS, FEW).items():
            _modes(session, errors, kind, rows, heads, session.dtype, session.dtype, block_size=16)
        session.say(f"{heads[0]} heads, {heads[1]} of keys")
    errors.write()


def run_types(session: Session) -> None:
    """Queries in float16 and float32."""
    errors = Errors(session)
    for head_dim in session.within_time(session.pick((128, 64), (16,))):
        for query in session.pick((torch.float16, torch.float32), (torch.float16,)):
            caches = (query, torch.int8) if query == torch.float32 else (query, torch.bfloat16, torch.int8, F8)
            for kv in session.pick(caches, (query,)):
                for kind, rows in session.pick(KINDS, FEW).items():
                    _modes(session, errors, kind, rows, (8, 2, head_dim), query, kv)
            session.say(f"heads of {head_dim}, queries in {name_of(query)}")
    errors.write()


def run_windows(session: Session) -> None:
    """Sliding windows, prefixes that several sequences share, soft caps of scores, and sinks."""
    from batchinfer.kernels.ragged_attention import SharedPrefix

    errors = Errors(session)
    for head_dim in session.within_time(session.pick((128, 64), (16,))):
        heads = session.pick((8, 2, head_dim), (2, 1, head_dim))
        for window in session.within_time(session.pick((1, 40, 600), (20,))):
            for kind, rows in session.pick(KINDS, FEW).items():
                _modes(session, errors, kind, rows, heads, session.dtype, session.dtype, window)
        keys = session.pick(1024, 64)
        rows = [(keys + 300, 1), (keys + 40, 4), (keys + 1, 1), (50, 2), (keys + 9, 9)]
        prefixes = (SharedPrefix(0, 3, keys),)
        for kv in session.pick((session.dtype, torch.int8, F8), (session.dtype,)):
            with session.case(f"shared prefix, heads of {head_dim}, cache in {name_of(kv)}"):
                case = paged(session, rows, heads, session.dtype, kv, prefixes=prefixes)
                for mode in _planned(session):
                    _check(session, errors, "shared prefix", mode, case, None)
        for kv in session.pick((session.dtype, torch.int8), (session.dtype,)):
            for kind, found in session.pick(KINDS, FEW).items():
                _modes(session, errors, kind, found, heads, session.dtype, kv, softcap=2.0)
                _modes(session, errors, kind, found, heads, session.dtype, kv, sunk=True)
        session.say(f"heads of {head_dim}")
    errors.write()


def _sizes(session: Session, head_dims: Sequence[int]) -> None:
    errors = Errors(session)
    for head_dim in head_dims:
        heads = session.pick((8, 2, head_dim), (2, 1, head_dim))
        for kv in session.within_time((session.dtype, torch.int8, F8)):
            for kind, rows in session.pick(KINDS, FEW).items():
                _modes(session, errors, kind, rows, heads, session.dtype, kv)
            session.say(f"heads of {head_dim}, cache in {name_of(kv)}")
    errors.write()


def _modes(
    session: Session,
    errors: Errors,
    kind: str,
    rows: Rows,
    heads: tuple[int, int, int],
    query: torch.dtype,
    kv: torch.dtype,
    window: int | None = None,
    block_size: int = 32,
    softcap: float | None = None,
    sunk: bool = False,
) -> None:
    """A batch with contexts whole, split, and split on the fixed grid."""
    types = f"queries in {name_of(query)}, cache in {name_of(kv)}"
    with session.case(f"attention, {kind}, heads {heads}, {types}, window {window}, soft cap {softcap}"):
        case = paged(session, rows, heads, query, kv, block_size)
        for mode in _planned(session):
            _check(session, errors, kind, mode, case, window, softcap, sunk)


def _planned(session: Session) -> dict[str, int | None]:
    """By mode: the processors that a plan is made for, None where bits must not depend on the batch."""
    modes: dict[str, int | None] = {"whole": 1, "split": 10 * session.gpu.processors, "deterministic": None}
    return modes if not session.smoke else {name: modes[name] for name in ("split", "deterministic")}


def _check(
    session: Session,
    errors: Errors,
    kind: str,
    mode: str,
    case: Paged,
    window: int | None,
    softcap: float | None = None,
    sunk: bool = False,
) -> None:
    from batchinfer.kernels.attention_triton import paged_attention

    tiles = case.tiles(session)
    tiles = replace(tiles, least=64) if mode == "split" else replace(tiles, split=session.pick(256, 64))
    plan = case.plan(session, _planned(session)[mode], window, tiles)
    longest = int(case.batch.contexts.max()) if window is None else window
    if mode != "whole" and longest > session.pick(512, 64):
        assert plan.partials > 0, f"{kind}: nothing is split"
    sinks = torch.linspace(-4, 4, case.query.shape[1], device=session.device) if sunk else None
    with poisoned():
        found = paged_attention(case.query, case.cache, plan, case.scale, softcap, sinks)
    assert found.dtype == case.query.dtype
    types = f"{name_of(case.query.dtype)}, cache {name_of(case.kv)}"
    capped = ("" if softcap is None else ", soft cap") + (", sinks" if sunk else "")
    seen = f", window {window}" if window else ", shared prefix" if case.batch.prefixes else ""
    kernel = f"attention, heads of {case.query.shape[2]}{seen}{capped}, {mode}"
    errors.close(kernel, types, found, case.expected(window, softcap, sinks), TOLERANCE[found.dtype])
