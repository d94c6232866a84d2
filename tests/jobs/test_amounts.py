"""Amounts as people read them."""

import pytest

from batchinfer.jobs.amounts import count_of, most_frequent


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 prompt tokens"), (1, "1 prompt token"), (2, "2 prompt tokens"), (1234, "1,234 prompt tokens")],
)
def test_one_thing_is_named_in_the_singular(number: int, said: str) -> None:
    assert count_of(number, "prompt token") == said


def test_sizes_that_are_not_listed_are_counted() -> None:
    counts = {str(size): size for size in range(1, 9)}
    assert most_frequent(counts, 7) == "2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 8: 8, 1 more size"
    assert most_frequent(counts, 6).endswith("8: 8, 2 more sizes")
