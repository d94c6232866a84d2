"""All cases of kernels: timed beside what the device can do; or called once, so that they are compiled."""

from collections.abc import Callable

from gpu_check import ceilings, speed_attention, speed_products, speed_rows
from gpu_check.cases import Case
from gpu_check.ceilings import Ceilings
from gpu_check.engines import release
from gpu_check.session import Session
from gpu_check.timing import Clock

FIRST = "First calls"
RELEASE_EVERY = 16
"""Cases: giving memory back takes longer than timing."""
KINDS: tuple[Callable[[Session], list[Case]], ...] = (
    speed_attention.cases,
    speed_products.cases,
    speed_rows.cases,
)


def every_case(session: Session) -> list[Case]:
    """Those that aims are about come first in each table."""
    return [case for cases in KINDS for case in cases(session)]


def run_first_calls(session: Session) -> None:
    """Call this process's share of the cases once."""
    count = 0
    for case in session.within_time(session.own(case for case in every_case(session) if case.ours)):
        with session.case(case.name):
            case.make()()
            session.synchronize()
            count += 1
        release(session)
    session.row(FIRST, share=session.share[0] + 1, cases=count)


def run(session: Session) -> None:
    """Time the cases, then hold them to the aims."""
    ceiling, clock = ceilings.known(session), Clock(session)
    try:
        for i, case in enumerate(session.within_time(_in_turns(session))):
            with session.case(case.name):
                _time(session, clock, ceiling, case)
            if i % RELEASE_EVERY == 0:
                release(session)
    finally:
        for judge in (speed_attention.judge, speed_products.judge):
            judge(session, ceiling)


def _time(session: Session, clock: Clock, ceiling: Ceilings, case: Case) -> None:
    try:
        times = clock(case.make())
    except RuntimeError as error:
        if case.ours:
            raise
        reason = str(error).splitlines()[0][:200]
        session.findings.note(f"{case.name}: skipped, torch refuses it here: {reason}")
        return
    session.row(case.table, **case.columns, **ceiling.columns(times, case.nbytes, case.operations, case.unit))


def _in_turns(session: Session) -> list[Case]:
    """Cases of all kinds, each kind's own in their order: time that runs out cuts all kinds alike."""
    kinds = [cases(session) for cases in KINDS]
    order = [(i / len(cases), which, case) for which, cases in enumerate(kinds) for i, case in enumerate(cases)]
    return [case for _, _, case in sorted(order, key=lambda found: found[:2])]


def slowest(session: Session, count: int) -> list[str]:
    """Names of our cases that take the longest beyond what the device needs at least, one of each table and kind."""
    found: dict[str, tuple[float, str]] = {}
    for case in every_case(session):
        for row in session.rows(case.table):
            if case.ours and all(row.get(key) == value for key, value in case.columns.items()):
                beyond = row["p50, us"] * (1 - row["of the ceiling, %"] / 100)
                kind = str(case.columns.get("kind", case.table))
                found[kind] = max(found.get(kind, (0.0, "")), (beyond, case.name))
    return [name for _, name in sorted(found.values(), reverse=True)[:count]]


def call(session: Session, name: str, times: int) -> None:
    """Call a case so many times."""
    found = next(case for case in every_case(session) if case.name == name).make()
    for _ in range(times):
        found()
    session.synchronize()
