"""Which lines of a template may change places, and what the template is then."""

import pytest

from batchinfer.jobs.rows.prompts import parse_template
from batchinfer.jobs.rows.template_order import TemplateLines

TEMPLATES = {
    "{a}": [[0]],
    "Classify: {a} and {b}": [[0]],
    "{a}\n{b}": [[0, 1]],
    "Look:\nA: {a}\nB: {b} {c}\nAnswer:\nC: {c}\nD: {d}\n": [[1, 2], [4, 5]],
    "A: {a}\r\nB: {b}\r\n\r\nC: {c}": [[0, 1], [3]],
    "{a}\n\n{b}\n\n{c}\n": [[0, 2, 4]],
    "{a}\n\n{b}\n\n\n{c}": [[0, 2], [5]],
    "{a}\n\n{b}\n{c}\n\n{d}": [[0], [2, 3], [5]],
    "{a}\n \n{b}": [[0], [2]],
    "{{a}}\n{b}\n{{x: {c}}}\n}}": [[1, 2]],
    "{odd\nname}\n{b}": [[0, 1]],
}


@pytest.mark.parametrize(("template", "runs"), TEMPLATES.items())
def test_runs_of_lines_with_fields(template: str, runs: list[list[int]]) -> None:
    found = TemplateLines.of(template)
    assert found.runs == runs
    assert found.text == template
    assert found.fields == [name for _, name in parse_template(template) if name is not None]


def test_lines_move_with_their_labels_and_ends_stay() -> None:
    given = TemplateLines.of("Look {{\r\nA: {a}\r\nB: {b} {a}\n{c}\nC: {c}")
    assert given.reordered([[4, 1, 3, 2]]).text == "Look {{\r\nC: {c}\r\nA: {a}\n{c}\nB: {b} {a}"
    apart = TemplateLines.of("{a}\n\nB: {b}\n")
    assert apart.reordered([[2, 0]]).text == "B: {b}\n\n{a}\n"


@pytest.mark.parametrize(
    ("template", "same"),
    [
        ("X\nA {a}\nB {b}\n\nC {c}", True),
        ("X\nB {b}\nA {a}\n\nC {c}", True),
        ("X\nB {a}\nA {b}\n\nC {c}", False),
        ("X\nA {a}\nC {c}\n\nB {b}", False),
        ("Y\nA {a}\nB {b}\n\nC {c}", False),
        ("X\nA {a}\nB {b}\nC {c}", False),
        ("X\r\nA {a}\nB {b}\n\nC {c}", False),
    ],
)
def test_a_template_that_has_the_lines_of_another_one(template: str, same: bool) -> None:
    given = TemplateLines.of("X\nA {a}\nB {b}\n\nC {c}")
    assert TemplateLines.of(template).has_lines_of(given) is same
    assert given.has_lines_of(TemplateLines.of(template)) is same
