"""Rows laid end to end, against the same in lists."""

from itertools import accumulate

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.kernels.ragged import indices_within, offsets_of, ranges, take_ragged


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 5)), max_size=20))
def test_ranges_are_those_of_lists(rows: list[tuple[int, int]]) -> None:
    starts, lengths = np.array(rows, np.int64).reshape(-1, 2).T
    numbers, offsets = ranges(starts, lengths)
    assert numbers.tolist() == [n for start, length in rows for n in range(start, start + length)]
    assert offsets.tolist() == offsets_of(lengths).tolist() == [0, *accumulate(lengths.tolist())]
    assert indices_within(lengths).tolist() == [n for _, length in rows for n in range(length)]


@given(st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1), st.data())
def test_rows_are_taken_in_any_order(rows: list[list[int]], data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, len(rows) - 1)))
    flat = np.array([n for row in rows for n in row], np.int32)
    values, offsets = take_ragged(flat, offsets_of(np.array([*map(len, rows)])), np.array(index, np.int64))
    assert values.tolist() == [n for i in index for n in rows[i]]
    assert np.diff(offsets).tolist() == [len(rows[i]) for i in index]
