"""Params as columns: they come back as they were, in every order and company."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.engine.request import Requests, params_of_all
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.engine.sampling_table import NUMBERS, SamplingTable

PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 2**31 - 1),
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(0, 1, exclude_min=True),
    repetition_penalty=st.floats(0.01, 100),
    frequency_penalty=st.floats(-2, 2),
    stop=st.sampled_from([(), ("END",), ("END", "\n")]),
    suppress_tokens=st.sampled_from([(), (5, 7)]),
    regex=st.sampled_from([None, "a+"]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=12))
def test_params_come_back(params: list[SamplingParams]) -> None:
    table = SamplingTable.of(params)
    assert list(table) == params and len(table) == len(params)
    index = np.random.default_rng(len(params)).integers(0, len(params), 20)
    assert list(table.take(index)) == [params[i] for i in index.tolist()]
    assert list(SamplingTable.joined([table, table.take(index)])) == [*params, *(params[i] for i in index.tolist())]
    once, where = SamplingTable.joined([table, table]).different()
    assert [once[j] for j in where] == params * 2
    assert len(once) == len(set(once)) == len(set(params))
    assert list(pickle.loads(pickle.dumps(table))) == params


@settings(max_examples=60, deadline=None)
@given(PARAMS, PARAMS)
def test_descriptions_are_equal_where_params_are(one: SamplingParams, other: SamplingParams) -> None:
    a, b, again = SamplingTable.of([one, other, one]).described()
    assert a == again == SamplingTable.of([one]).described()[0]
    assert (a == b) == (one == other)


def test_the_description_of_the_defaults_is_empty() -> None:
    assert SamplingTable.of([SamplingParams()]).described() == [b""]


def test_max_tokens_are_limited_one_by_one() -> None:
    table = SamplingTable.of([SamplingParams(max_tokens=n, stop=("x",)) for n in (1, 5, 9)])
    found = table.limited(np.array([3, 3, 9]))
    assert list(found) == [replace(params, max_tokens=n) for params, n in zip(table, (1, 3, 9), strict=True)]


def test_a_million_different_rows_are_flat_arrays() -> None:
    """Pickled, as they are sent between processes, a row takes the bytes of its numbers."""
    n, shared = 1_000_000, SamplingTable.of([SamplingParams(stop=("END",))])
    table = shared.take(np.zeros(n, np.int64))
    table.numbers["temperature"] = np.arange(n) / n
    assert len(pickle.dumps(table)) < n * (NUMBERS.itemsize + 4) + 10_000
    assert table[n - 1] == SamplingParams(stop=("END",), temperature=(n - 1) / n)


def test_rows_of_several_slices_keep_their_params() -> None:
    slices = [Requests.of([[1], [2]], SamplingParams(max_tokens=m)) for m in (3, 4, 3)]
    params, index = params_of_all(slices)
    assert [params[i].max_tokens for i in index] == [3, 3, 4, 4, 3, 3] and len(params) == 2


@pytest.mark.parametrize("name", NUMBERS.names or ())
def test_each_number_is_a_column(name: str) -> None:
    requests = Requests.of([[1], [2]], SamplingParams())
    assert requests.number(name).tolist() == [getattr(SamplingParams(), name)] * 2
