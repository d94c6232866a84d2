"""The order of lines, against all orders of small tables, by what the rendered prompts really have in common."""

from collections.abc import Callable, Sequence
from itertools import pairwise, permutations, takewhile

import numpy as np
import pytest

from batchinfer.jobs.plan.field_order import Piece, best_order, distinct_rows, shared_lengths
from batchinfer.jobs.rows.field_values import FieldValues

Rng = np.random.Generator
Texts = list[list[str]]  # of each field, of each row


def values_of(texts: Texts) -> FieldValues:
    codes = [np.unique(some, return_inverse=True)[1].astype(np.int32) for some in texts]
    return FieldValues(codes, [np.array([len(text) for text in some], np.int32) for some in texts])


def named(rng: Rng, count: int, least: int, most: int) -> list[str]:
    """Different values, no two of which begin alike."""
    sizes = rng.integers(least, most + 1, count).tolist()
    return [chr(0x100 + i) + "x" * (size - 1) for i, size in enumerate(sizes)]


def drawn(rng: Rng, rows: int, count: int, least: int = 1, most: int = 20) -> list[str]:
    return rng.choice(named(rng, count, least, most), rows).tolist()


def common(texts: Texts, lines: Sequence[Sequence[tuple[str, int | None]]], order: Sequence[int]) -> int:
    """Count the characters that sorted prompts have in common with the one before; equal prompts run once."""
    prompts = {
        "".join(text + ("" if index is None else texts[index][row]) for line in order for text, index in lines[line])
        for row in range(len(texts[0]))
    }
    return sum(map(in_common, *zip(*pairwise(sorted(prompts)), strict=True))) if len(prompts) > 1 else 0


def in_common(a: str, b: str) -> int:
    """The number of characters with which both texts begin."""
    return sum(1 for _ in takewhile(lambda signs: signs[0] == signs[1], zip(a, b, strict=False)))


def independent(rng: Rng, rows: int, fields: int) -> Texts:
    return [drawn(rng, rows, int(rng.integers(1, 2 + rows // 2))) for _ in range(fields)]


def dependent(rng: Rng, rows: int, fields: int) -> Texts:
    """Half of the fields follow from another field, as a country does from a city."""
    texts = independent(rng, rows, fields - fields // 2)
    for _ in range(fields // 2):
        source = texts[int(rng.integers(len(texts)))]
        kinds = sorted(set(source))
        to = dict(zip(kinds, drawn(rng, len(kinds), int(rng.integers(1, len(kinds) + 1))), strict=True))
        texts.append([to[value] for value in source])
    return [texts[i] for i in rng.permutation(fields)]


def skewed(rng: Rng, rows: int, fields: int) -> Texts:
    """Few values have most of the rows, and a field is a key or constant."""
    texts = []
    for _ in range(fields):
        values = named(rng, rows, 1, 40)
        texts.append([values[min(int(rank), rows) - 1] for rank in rng.zipf(1.3 + 2 * rng.random(), rows)])
    texts[int(rng.integers(fields))] = [chr(0x4000 + i) + "key" for i in range(rows)]
    texts[int(rng.integers(fields))] = ["same"] * rows
    return texts


def alone(fields: int) -> list[list[tuple[str, int | None]]]:
    """A line for each field, with a label that begins as no other label does."""
    return [[(f"{chr(65 + i)}: ", i), ("\n", None)] for i in range(fields)]


def pieces(lines: Sequence[Sequence[tuple[str, int | None]]]) -> list[list[Piece]]:
    return [[(len(text), index) for text, index in line] for line in lines]


KINDS = pytest.mark.parametrize("kind", [independent, dependent, skewed])


@KINDS
@pytest.mark.parametrize("seed", range(6))
def test_up_to_six_lines_have_the_best_of_all_orders(kind: Callable[[Rng, int, int], Texts], seed: int) -> None:
    rng = np.random.default_rng(seed)
    fields = 2 + seed % 4
    texts = kind(rng, 30 + 10 * seed, fields)
    found = best_order(pieces(alone(fields)), distinct_rows(values_of(texts)))
    most = max(common(texts, alone(fields), order) for order in permutations(range(fields)))
    assert common(texts, alone(fields), found) == most


@KINDS
@pytest.mark.parametrize("seed", range(4))
def test_of_seven_lines_the_order_is_within_five_percent_of_the_best(
    kind: Callable[[Rng, int, int], Texts], seed: int
) -> None:
    """The best by trying every order, by counts that `common` confirms for the best one and the one that is found."""
    rng = np.random.default_rng(100 + seed)
    texts = kind(rng, 40, 7)
    lines, values = pieces(alone(7)), distinct_rows(values_of(texts))
    found = common(texts, alone(7), best_order(lines, values))
    best = best_order(lines, values, width=1 << 7)
    assert found >= 0.95 * common(texts, alone(7), best)
    others = [rng.permutation(7).tolist() for _ in range(100)]
    assert max(common(texts, alone(7), order) for order in others) <= common(texts, alone(7), best)


@KINDS
def test_what_rows_share_is_what_their_prompts_have_in_common(kind: Callable[[Rng, int, int], Texts]) -> None:
    rng = np.random.default_rng(7)
    texts = kind(rng, 200, 4)
    for order in permutations(range(4)):
        shared = shared_lengths(
            [piece for i in order for piece in pieces(alone(4))[i]], distinct_rows(values_of(texts))
        )
        assert shared.sum() == common(texts, alone(4), order)


@pytest.mark.parametrize("seed", range(4))
def test_lines_with_several_fields_and_fields_in_several_lines(seed: int) -> None:
    """The first field of a line may be shared without the second, and a field that was before parts no rows."""
    rng = np.random.default_rng(seed)
    texts = [drawn(rng, 60, count) for count in (3, 8, 20, 40)]
    lines = [[("A", 0), (" of ", 3)], [("B", 1), ("\n", None)], [("C", 1), ("-", 2), ("-", 1)], [("D", 0)]]
    found = best_order(pieces(lines), distinct_rows(values_of(texts)))
    most = max(common(texts, lines, order) for order in permutations(range(4)))
    assert common(texts, lines, found) == most


def test_a_field_with_few_values_comes_first_and_one_that_follows_from_it_costs_nothing() -> None:
    country, city, street = ["aa", "bb"] * 8, ["c", "d", "e", "f"] * 4, [chr(0x4000 + i) for i in range(16)]
    values = values_of([street, city, country])
    assert best_order(pieces(alone(3)), values) == [2, 1, 0]
    # Behind the city, neither the city nor the country parts any rows: both cost nothing and keep their order.
    assert best_order(pieces(alone(3)), values, before=[1]) == [1, 2, 0]


def test_a_long_field_may_be_worth_more_than_one_with_fewer_values() -> None:
    short, long = ["a", "b"] * 8, [name * 100 for name in "cdef" for _ in range(4)]
    assert best_order([[(0, 0)], [(0, 1)]], values_of([short, long])) == [1, 0]
    assert best_order([[(0, 0)], [(0, 1)]], values_of([short, [text[0] for text in long]])) == [0, 1]


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("fields", [1, 3, 9])
def test_lines_that_are_equally_good_stay_where_they_are(rows: int, fields: int) -> None:
    """Nothing is shared by no rows, by one, or by two that differ everywhere; and constant fields cost nothing."""
    different = values_of([[f"{i}" for i in range(rows)]] * fields)
    constant = values_of([["same"] * 20] * fields)
    for values in (different, constant):
        assert best_order(pieces(alone(fields)), values) == list(range(fields))
    assert distinct_rows(constant).rows == 1
