"""Charts: what stands where, read back from the SVG."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from batchinfer.jobs.charts import (
    BOTTOM,
    FIRST,
    LEFT,
    RIGHT,
    SECOND,
    TOP,
    bars_beside_names,
    bars_over_lengths,
    lines_over_time,
    roofline,
    short,
    steps_to,
)

SVG = "{http://www.w3.org/2000/svg}"


def curve(chart: str, colour: str) -> list[tuple[float, float]]:
    """The points of the line of a colour."""
    paths = [path.attrib["d"] for path in drawn(chart).iter(f"{SVG}path") if path.attrib["stroke"] == colour]
    assert len(paths) == 1
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", paths[0])]


def drawn(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart)


def texts(chart: str) -> list[str]:
    return [text.text or "" for text in drawn(chart).iter(f"{SVG}text")]


def test_a_sample_is_a_level_line_over_its_own_time() -> None:
    chart = lines_over_time("T", [1.0, 4.0], [("a", FIRST, [10.0, 5.0]), ("b", SECOND, [0.0, 10.0])])
    first, second = curve(chart, FIRST), curve(chart, SECOND)
    quarter = LEFT + (RIGHT - LEFT) / 4
    assert [x for x, _ in first] == [LEFT, quarter, quarter, RIGHT]
    assert [y for _, y in first] == [TOP, TOP, (TOP + BOTTOM) / 2, (TOP + BOTTOM) / 2]
    assert [y for _, y in second] == [BOTTOM, BOTTOM, TOP, TOP]
    assert {"a", "b", "0 s", "2 s", "4 s", "10"} <= set(texts(chart))


@pytest.mark.parametrize(("last", "shown"), [
    (0.5, ["0 s", "0.1 s", "0.2 s", "0.3 s", "0.4 s", "0.5 s"]),
    (12.7, ["0 s", "4 s", "8 s", "12 s"]),
    (119.0, ["0 s", "20 s", "40 s", "60 s", "80 s", "100 s"]),
    (600.0, ["0 min", "2 min", "4 min", "6 min", "8 min", "10 min"]),
    (86400.0, ["0 h", "5 h", "10 h", "15 h", "20 h"]),
    (0.0, ["0 s"]),
])  # fmt: skip
def test_times_are_round_and_have_the_unit_that_suits(last: float, shown: list[str]) -> None:
    unit = shown[0][1:]
    assert [said for said in texts(lines_over_time("T", [last], [("a", FIRST, [1.0])])) if said.endswith(unit)] == shown


@pytest.mark.parametrize("peak", [9e10, 1.7e12, 9.1e14])
@pytest.mark.parametrize("intensity", [0.5, 20.0, 300.0, 1e5])
def test_a_roofline_has_marks_on_both_axes(peak: float, intensity: float) -> None:
    chart = roofline("T", peak, peak / 200, intensity, min(peak, intensity * peak / 200) / 3)
    marks = [text.attrib["text-anchor"] for text in drawn(chart).iter(f"{SVG}text")]
    assert 2 <= marks.count("middle") <= 4 and 2 <= marks.count("end") - 1 <= 4, "one names the lower axis"
    assert {"this job", "ceilings", "operations a byte"} <= set(texts(chart))


def test_bars_are_as_long_as_their_values() -> None:
    chart = bars_beside_names("T", {"load": [1.0], "decode": [4.0], "merge": [0.0]}, str)
    bars = [float(bar.attrib["width"]) for bar in drawn(chart).iter(f"{SVG}rect")]
    assert bars[1] == pytest.approx(4 * bars[0], rel=1e-3) and bars[2] == 1.0
    assert texts(chart) == ["load", "1.0", "decode", "4.0", "merge", "0.0"]


def test_two_values_of_a_name_have_bars_of_two_colours_that_do_not_touch() -> None:
    bars = list(drawn(bars_beside_names("T", {"load": [1.0, 2.0], "decode": [4.0, 3.0]}, str)).iter(f"{SVG}rect"))
    assert [bar.attrib["fill"] for bar in bars] == [FIRST, SECOND] * 2
    edges = [(float(bar.attrib["y"]), float(bar.attrib["y"]) + float(bar.attrib["height"])) for bar in bars]
    assert all(end < begin for (_, end), (begin, _) in pairwise(edges))


def test_buckets_are_as_high_as_their_counts_and_say_them() -> None:
    bars = list(drawn(bars_over_lengths("T", {"32": 5, "64": 10, "128": 0})).iter(f"{SVG}rect"))
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert heights[1] == pytest.approx(BOTTOM - TOP) and heights[0] == pytest.approx(heights[1] / 2) and heights[2] == 0
    assert [bar.findtext(f"{SVG}title") for bar in bars][1] == "up to 64 tokens: 10"


def test_the_job_lies_below_the_roof_by_what_it_lacks() -> None:
    operations, nbytes = 1e12, 1e10
    on_the_roof = roofline("T", operations, nbytes, 1000.0, operations)
    below = roofline("T", operations, nbytes, 10.0, 0.5 * 10 * nbytes)

    def dot(chart: str) -> tuple[float, float]:
        circle = next(drawn(chart).iter(f"{SVG}circle"))
        return float(circle.attrib["cx"]), float(circle.attrib["cy"])

    roof = curve(on_the_roof, "var(--faint, #5f6b7a)")
    assert dot(on_the_roof)[1] == roof[1][1] == roof[2][1]
    x, y = dot(below)
    (x0, y0), (x1, y1), _ = curve(below, "var(--faint, #5f6b7a)")
    assert y > y0 + (y1 - y0) * (x - x0) / (x1 - x0) + 5, "it is under the slope"


@pytest.mark.parametrize(
    ("most", "step", "top"), [(0, 1, 1), (7, 1, 7), (10, 2, 10), (97, 20, 100), (1600, 200, 1600), (0.03, 0.005, 0.03)]
)
def test_axes_have_round_steps(most: float, step: float, top: float) -> None:
    assert steps_to(most) == (pytest.approx(step), pytest.approx(top))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (999.4, "999"),
        (999.6, "1k"),
        (1024, "1.02k"),
        (1.2e8, "120M"),
        (2.5e12, "2.5T"),
        (1e15, "1P"),
    ],
)
def test_numbers_are_short(value: float, shown: str) -> None:
    assert short(value) == shown and len(shown) <= 5


@pytest.mark.parametrize("most", [0.0, 1e-9, 3.3, 5e13])
def test_no_figure_breaks_a_chart(most: float) -> None:
    chart = lines_over_time("a < b", [0.0, 1e-9], [("x", FIRST, [0.0, most])])
    assert all(math.isfinite(y) for _, y in curve(chart, FIRST)) and drawn(chart).findtext(f"{SVG}title") == "a < b"
