"""A flag's bounds: what they allow, and what is said of a value that they do not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from batchinfer.flag import Flag, Kind, flags_of, problems

YES_OR_NOTHING = Kind("yes", lambda flag, text: bool(text), none="nothing")


@dataclass(frozen=True)
class Oven:
    plate: Annotated[str, Flag("Bake this.", "Food", name="dish", positional=True)]
    minutes: Annotated[int, Flag("Bake for N minutes.", "Heat", at_least=1, at_most=90)] = 20
    heat: Annotated[float | None, Flag("Bake at this heat.", "Heat", above=0, unit="degrees")] = None
    shelf: Annotated[str, Flag("Use this shelf.", "Heat", choices=("low", "high"))] = "low"
    spices: Annotated[tuple[str, ...], Flag("Add this spice.", "Food")] = ()
    recipe: Annotated[Path | None, Flag("Read this recipe.", "Food")] = None
    fan: Annotated[bool, Flag("Blow.", "Heat")] = True
    timer: Annotated[bool | None, Flag("Ring.", "Heat", kind=YES_OR_NOTHING)] = None
    colour: str = "white"


def test_name_type_and_default_are_the_field_s() -> None:
    flags = flags_of(Oven)
    assert list(flags) == ["plate", "minutes", "heat", "shelf", "spices", "recipe", "fan", "timer"]
    assert [flag.option for flag in flags.values()][:3] == ["DISH", "--minutes", "--heat"]
    assert [flag.type for flag in flags.values()] == [str, int, float, str, tuple[str, ...], Path, bool, bool]
    assert [flag.shown_default for flag in flags.values()] == ["", "20", "", "low", "", "", "fan", "nothing"]
    assert [flag.value_name for flag in flags.values()] == ["TEXT", "N", "DEGREES", "TEXT", "TEXT", "FILE", "", "yes"]
    assert [name for name, flag in flags.items() if flag.many] == ["spices"]
    assert [name for name, flag in flags.items() if flag.is_path] == ["recipe"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, []),
        ({"minutes": 1, "heat": 0.1, "shelf": "high"}, []),
        ({"minutes": 0}, ["--minutes is 0; it must be from 1 to 90"]),
        ({"heat": 0.0}, ["--heat is 0.0; it must be above 0 degrees"]),
        ({"heat": float("nan")}, ["--heat is nan; it must be above 0 degrees"]),
        (
            {"minutes": 91, "shelf": "top"},
            ["--minutes is 91; it must be from 1 to 90", "--shelf is 'top'; it must be one of low, high"],
        ),
    ],
)
def test_each_value_out_of_bounds_is_named(fields: dict[str, Any], said: list[str]) -> None:
    assert [f"{flag.option} {problem}" for flag, problem in problems(Oven("cake", **fields))] == said


@pytest.mark.parametrize(
    ("bounds", "words", "allowed", "refused"),
    [
        ({"at_least": 2}, "2 or more", [2, 9], [1.9]),
        ({"above": 2}, "above 2", [2.1], [2, -1]),
        ({"at_most": 2}, "at most 2", [2, -1], [2.1]),
        ({"below": 2}, "below 2", [1.9], [2]),
        ({"at_least": 0, "at_most": 1, "off": 0}, "from 0 (off) to 1", [0, 1], [-0.1, 1.1]),
        ({"at_least": 0, "below": 1}, "from 0 to below 1", [0, 0.9], [1, -0.1]),
        ({"above": 0, "at_most": 1, "off": 1}, "above 0 and at most 1 (off)", [0.1, 1], [0, 1.1]),
        ({"above": 0, "below": 1}, "above 0 and below 1", [0.5], [0, 1]),
        ({"choices": (8, 16)}, "one of 8, 16", [8, 16], [9]),
        ({}, "", [0, "x"], []),
    ],
)
def test_bounds_in_words(bounds: dict[str, Any], words: str, allowed: list[Any], refused: list[Any]) -> None:
    flag = Flag("", "", **bounds)
    assert flag.bound == words
    assert [flag.problem(value) for value in [*allowed, None]] == [None] * (len(allowed) + 1)
    assert all(flag.problem(value) == f"is {value}; it must be {words}" for value in refused)
