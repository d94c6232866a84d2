"""Rows that kill an engine are found among others that do not, with few deaths."""

import math

from hypothesis import given
from hypothesis import strategies as st

from batchinfer.jobs.process.suspects import Suspects


def run(rows: int, batch: int, killers: set[int]) -> tuple[set[int], set[int], int]:
    """(rows that ended, rows given up, deaths): an engine that takes rows in order, `batch` of them at a time."""
    suspects, ended, given_up, deaths = Suspects(), set[int](), set[int](), 0
    while len(ended | given_up) < rows:
        waiting = suspects.alone or [row for row in range(rows) if row not in ended | given_up]
        in_flight = waiting[:batch]
        if killers & set(in_flight):
            deaths += 1
            given_up |= set(suspects.died(in_flight))
        else:
            ended |= set(in_flight)
            suspects.finished(set(in_flight))
    return ended, given_up, deaths


@given(rows=st.integers(1, 200), batch=st.integers(1, 64), seed=st.sets(st.integers(0, 199), max_size=4))
def test_killers_are_given_up_and_no_others(rows: int, batch: int, seed: set[int]) -> None:
    killers = {row for row in seed if row < rows}
    ended, given_up, deaths = run(rows, batch, killers)
    assert given_up == killers and ended == set(range(rows)) - killers
    assert deaths <= len(killers) * (2 + 1 + math.ceil(math.log2(batch)) + 1)


def test_a_death_that_was_nobodys_fault_is_forgiven() -> None:
    suspects = Suspects()
    assert suspects.died([1, 2, 3]) == [] and suspects.alone == []
    assert suspects.died([4, 5]) == [] and suspects.alone == []
    assert suspects.died([3, 6]) == [] and suspects.alone == [3]
    assert suspects.finished({3}) and suspects.alone == []
