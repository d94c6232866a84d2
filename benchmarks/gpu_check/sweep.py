"""Other tiles and plans of attention than those that ship, each timed: to choose constants by."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from gpu_check.engines import release
from gpu_check.paged import paged
from gpu_check.session import Session, name_of
from gpu_check.speed_attention import steps
from gpu_check.timing import Clock

from batchinfer.kernels import attention_plan
from batchinfer.kernels.attention_plan import Tile, Tiling
from batchinfer.kernels.attention_triton import paged_attention

TITLE = "Attention with other tiles"
PLANS = "Attention with other numbers of items for each multiprocessor"


def run(session: Session) -> None:
    """Decoding by tiles for few tokens, prompts by tiles for many, then decoding by numbers of items."""
    clock = Clock(session)
    decode, prefill = steps(session)[:2]
    for step, kind in ((decode, "few"), (prefill, "many")):
        for kv in step.kv:
            case = paged(session, step.rows, session.pick((32, 8, 128), (4, 2, 16)), session.dtype, kv, known=False)
            shipped = case.tiles(session)
            for tile in session.within_time(_others(session, getattr(shipped, kind))):
                name = f"{step.name}, cache in {name_of(kv)}, {tile}"
                with session.case(name):
                    plan = case.plan(session, session.gpu.processors, None, _with(shipped, kind, tile))
                    try:
                        times = clock(
                            lambda case=case, plan=plan: paged_attention(case.query, case.cache, plan, case.scale)
                        )
                    except Exception as error:  # a tile that takes more than there is, is none to ship
                        session.row(TITLE, step=step.name, cache=name_of(kv), **vars(tile), why=str(error)[:100])
                        continue
                    same = "shipped" if tile == getattr(shipped, kind) else ""
                    session.row(TITLE, step=step.name, cache=name_of(kv), **vars(tile), which=same, **times.columns)
            del case
            release(session)
    _plans(session, clock)


def _with(shipped: Tiling, kind: str, tile: Tile) -> Tiling:
    return replace(shipped, **{kind: tile})


def _others(session: Session, shipped: Tile) -> Iterator[Tile]:
    """The shipped tile first."""
    yield shipped
    rows = (shipped.rows,) if shipped.rows < 64 else (64, 128)
    keys, warps, stages = session.pick(((16, 32, 64, 128), (4, 8), (2, 3, 4, 5)), ((32,), (4,), (2,)))
    for r, k, w, s in product(rows, keys, warps, stages):
        tile = replace(shipped, rows=r, keys=k, warps=w, stages=s)
        if tile != shipped:
            yield tile


def _plans(session: Session, clock: Clock) -> None:
    decode, _, ragged, *_ = [*steps(session), steps(session)[0]]
    before = attention_plan.MOST_WAVES
    for step, items in session.within_time(product((decode, ragged), session.pick((1, 2, 3, 4, 6, 8, 12), (2,)))):
        with session.case(f"{step.name}, {items} items for each multiprocessor"):
            case = paged(
                session, step.rows, session.pick((32, 8, 128), (4, 2, 16)), session.dtype, step.kv[0], known=False
            )
            attention_plan.MOST_WAVES = items
            try:
                plan = case.plan(session, session.gpu.processors)
            finally:
                attention_plan.MOST_WAVES = before
            times = clock(lambda case=case, plan=plan: paged_attention(case.query, case.cache, plan, case.scale))
            session.row(PLANS, step=step.name, items=items, shipped=items == before, **times.columns)
        release(session)
