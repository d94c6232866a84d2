"""The rules by which a step is filled."""

import numpy as np
import pytest

from batchinfer.engine.step_policy import chunk_end, decoding, tiles_of
from batchinfer.kernels.grain import padded_logits


@pytest.mark.parametrize(
    ("start", "stop", "room", "end"),
    [
        (0, 100, 512, 100),  # all of it
        (0, 100, 100, 100),
        (0, 100, 99, 64),  # on the grid
        (0, 1000, 512, 512),
        (70, 1000, 100, 128),  # a shared beginning may end off the grid
        (64, 1000, 63, 64),  # no tile fits
        (70, 1000, 20, 64),
        (128, 129, 1, 129),
    ],
)
def test_a_chunk_ends_at_the_prompts_end_or_on_the_grid(start: int, stop: int, room: int, end: int) -> None:
    assert chunk_end(start, stop, room) == end


@pytest.mark.parametrize(("start", "end", "tiles"), [(0, 64, [0]), (0, 65, [0, 1]), (70, 200, [1, 2, 3])])
def test_the_tiles_of_a_chunk(start: int, end: int, tiles: list[int]) -> None:
    assert list(tiles_of(start, end)) == tiles


def test_what_decodes_has_its_prompt_computed_and_more_to_come_than_a_token() -> None:
    computed, prompt, end = np.array([9, 10, 11, 11, 13]), np.full(5, 10), np.array([12, 12, 12, 13, 13])
    assert decoding(computed, prompt, end).tolist() == [False, True, False, True, False]


def test_logits_are_padded_to_eight_rows() -> None:
    assert [padded_logits(rows) for rows in (0, 1, 8, 9)] == [0, 8, 8, 16]
