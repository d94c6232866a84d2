"""What a report notes of rows as they are merged."""

import pyarrow as pa
import pytest

from batchinfer.jobs.results.glance import FIRST, MOST_LETTERS, Answer, Glance


def results(codes: list[str | None], first: int = 0) -> pa.Table:
    return pa.table(
        {
            "generated_text": pa.array(
                [None if code else f"text {first + i}" for i, code in enumerate(codes)], pa.string()
            ),
            "finish_reason": ["error" if code else "stop" for code in codes],
            "error_code": pa.array(codes, pa.string()),
        }
    )


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_the_first_rows_of_each_code_are_noted_however_rows_come(batch: int) -> None:
    codes = ["too_long" if row % 3 == 0 else "null_prompt" if row == 50 else None for row in range(100)]
    glance = Glance()
    for first in range(0, 100, batch):
        glance.see(first, results(codes[first : first + batch], first))
    assert dict(glance.first_errors) == {"too_long": [0, 3, 6, 9, 12][:FIRST], "null_prompt": [50]}
    assert glance.answers == []


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_answers_are_taken_at_equal_distances(batch: int) -> None:
    codes: list[str | None] = [None] * 100
    codes[50] = "too_long"
    glance = Glance(4, 100)
    for first in range(0, 100, batch):
        glance.see(first, results(codes[first : first + batch], first))
    texts = [
        Answer(row, None if row == 50 else f"text {row}", "too_long" if row == 50 else "stop")
        for row in (0, 25, 50, 75)
    ]
    assert glance.answers == texts


def test_no_more_answers_are_noted_than_there_are_rows_or_letters_than_are_shown() -> None:
    glance = Glance(10, 1)
    glance.see(
        0, pa.table({"generated_text": ["x" * 5000], "finish_reason": ["stop"], "error_code": pa.nulls(1, pa.string())})
    )
    assert [len(answer.text or "") for answer in glance.answers] == [MOST_LETTERS]
