"""Penalties and bans, against transformers' processors and a few lines of numpy."""

import numpy as np
import torch
import transformers

from batchinfer.kernels.logits import LogitsChanges, change_logits


def changes(
    rows: list[int],
    ids: list[int],
    factor: float,
    subtracted: list[float],
    banned: int,
    forced: dict[int, int] | None = None,
) -> LogitsChanges:
    return LogitsChanges(
        torch.tensor(rows),
        torch.tensor(ids),
        torch.full((len(ids),), factor),
        torch.tensor(subtracted),
        torch.tensor([rows[0]]),
        torch.tensor([banned]),
        torch.tensor([*(forced or {})], dtype=torch.int64),
        torch.tensor([*(forced or {}).values()], dtype=torch.int64),
    )


def test_a_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(3, 50)
    seen = torch.tensor([[4, 9, 4, 30]])
    expected = logits.clone()
    penalty = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    expected[1] = penalty(seen, logits[1:2])[0]  # type: ignore[arg-type]
    expected[1, 2] = float("-inf")
    change_logits(logits, changes([1, 1, 1], [4, 9, 30], 1.7, [0, 0, 0], 2))
    assert torch.equal(logits, expected)


def test_what_is_subtracted_comes_after_the_factor() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0, 1.0]])
    change_logits(logits, changes([0, 0], [0, 1], 2.0, [0.5, 1.0], 3))
    np.testing.assert_array_equal(logits.numpy(), [[0.5, -5.0, 3.0, -np.inf]])


def test_values_that_are_not_finite_are_not_hidden_by_a_ban() -> None:
    for value in (float("nan"), float("inf")):
        logits = torch.full((1, 4), value)
        change_logits(logits, changes([0], [0], 2.0, [0.5], 3))
        assert not logits[0, 3].isfinite() and logits[0, 3] != float("-inf")


def test_a_forced_token_is_the_only_one_left_of_its_row() -> None:
    logits, infinite = torch.tensor([[2.0, 1.0, 3.0]] * 3), float("-inf")
    change_logits(logits, changes([2], [0], 2.0, [0.0], 1, forced={0: 1, 2: 0}))
    assert logits.tolist() == [[infinite, 1.0, infinite], [2.0, 1.0, 3.0], [1.0, infinite, infinite]]
    for value in (float("nan"), float("inf")):
        logits = torch.tensor([[value, 1.0, 3.0]])
        change_logits(logits, changes([0], [1], 1.0, [0.0], 2, forced={0: 1}))
        assert not logits.max().isfinite()  # values that are not finite are not hidden


def test_ids_beyond_the_vocabulary_are_left_out() -> None:
    logits = torch.ones(1, 4)
    change_logits(logits, changes([0, 0], [1, 4], 2.0, [0.0, 0.0], 7).within(4))
    assert logits.tolist() == [[1.0, 0.5, 1.0, 1.0]]
