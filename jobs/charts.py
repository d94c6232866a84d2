"""Drawing small charts as SVG: lines over time, bars beside names, bars over lengths, a roofline.

Colours are CSS variables with a fallback: inside a page a chart takes those of the page, light or dark.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

INK, FAINT, GRID = "var(--ink, #1f2933)", "var(--faint, #5f6b7a)", "var(--grid, #e3e7ec)"
FIRST, SECOND = "var(--first, #2f6db0)", "var(--second, #d9622b)"
FONT = "font-family=\"system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif\""
WIDTH, HEIGHT = 360, 190  # of a chart in a page, which is seldom shown much larger or smaller
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 12, 152  # edges of its area

Curve = tuple[str, str, Sequence[float]]
"""(name, colour, values) of a line."""


def svg(width: float, height: float, parts: Iterator[str], title: str) -> str:
    """Put parts together as a picture, whose `title` is read to those who do not see it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" {FONT} '
        f'font-size="11"><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )


def lines_over_time(title: str, seconds: Sequence[float], curves: Sequence[Curve], unit: str = "") -> str:
    """Draw curves over the seconds at which their samples end [n], ascending."""
    step, top = steps_to(max([0.0, *(value for _, _, values in curves for value in values)]))
    last = seconds[-1] if seconds else 1.0

    def parts() -> Iterator[str]:
        yield from _level_lines(step, top, unit)
        yield from _time_axis(last)
        for _, colour, values in curves:
            # Each sample is a level line over its own time.
            points, began = list[str](), 0.0
            for ended, value in zip(seconds, values, strict=True):
                y = _y(value, top)
                points += [f"{_x(began, last):.1f} {y:.1f}", f"{_x(ended, last):.1f} {y:.1f}"]
                began = ended
            yield f'<path d="M{"L".join(points)}" fill="none" stroke="{colour}" stroke-width="1.8"/>' if points else ""
        if len(curves) > 1:
            yield from legend([(name, colour) for name, colour, _ in curves], HEIGHT - 8)

    return svg(WIDTH, HEIGHT if len(curves) > 1 else BOTTOM + 22, parts(), title)


def bars_beside_names(title: str, values: Mapping[str, Sequence[float]], shown: Callable[[float], str]) -> str:
    """Draw a bar for each of one or two values beside their name, one above the other, with their texts."""
    most = max([*(value for some in values.values() for value in some), 1e-12])
    bars = max([len(some) for some in values.values()], default=1)
    thick, gap = (16, 24) if bars == 1 else (12, 36)
    names_end, bars_end = 108, 270

    def parts() -> Iterator[str]:
        for i, (name, some) in enumerate(values.items()):
            top = 6 + gap * i
            yield text(names_end - 8, top + (gap - 8) / 2 + 4, name, INK, anchor="end")
            for j, (value, colour) in enumerate(zip(some, (FIRST, SECOND), strict=False)):
                y, width = top + (thick + 2) * j, max(1.0, value / most * (bars_end - names_end))
                yield f'<rect x="{names_end}" y="{y}" width="{width:.1f}" height="{thick}" fill="{colour}"/>'
                yield text(names_end + width + 6, y + thick / 2 + 4, shown(value), FAINT)

    return svg(WIDTH, 8 + gap * len(values), parts(), title)


def bars_over_lengths(title: str, counts: Mapping[str, int]) -> str:
    """Draw a bar for each bucket of lengths; `counts` maps its longest length, a power of two, to its number."""
    step, top = steps_to(max([0, *counts.values()]))
    slot = (RIGHT - LEFT) / max(len(counts), 1)
    width = min(36.0, 0.8 * slot)

    def parts() -> Iterator[str]:
        yield from _level_lines(step, top, "")
        every = math.ceil(len(counts) * 30 / (RIGHT - LEFT))  # a label takes 30
        for i, (longest, count) in enumerate(counts.items()):
            middle, y = LEFT + (i + 0.5) * slot, _y(count, top)
            yield (
                f'<rect x="{middle - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BOTTOM - y:.1f}" '
                f'fill="{FIRST}"><title>up to {longest} tokens: {count:,}</title></rect>'
            )
            if i % every == 0:
                shown = f"{int(longest) // 1024}k" if int(longest) >= 1024 else longest
                yield text(middle, BOTTOM + 15, shown, FAINT, anchor="middle")
        yield text(RIGHT, HEIGHT - 8, "tokens, at most", FAINT, anchor="end")

    return svg(WIDTH, HEIGHT, parts(), title)


def roofline(title: str, operations: float, nbytes: float, intensity: float, reached: float) -> str:
    """Draw the ceilings of a device, operations and bytes a second, and the job under them, on logarithmic axes.

    `intensity` is the job's operations for a byte, and `reached` its operations a second.
    Source: Williams, Waterman and Patterson, "Roofline", 2009.
    """
    ridge = operations / nbytes
    low_x, high_x = min(intensity, ridge) / 4, max(intensity, ridge) * 4
    low_y, high_y = min(reached, operations) / 4, operations * 2.5

    def at(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (RIGHT - LEFT) * math.log(x / low_x) / math.log(high_x / low_x)
        return right, BOTTOM - (BOTTOM - TOP) * math.log(max(y, low_y) / low_y) / math.log(high_y / low_y)

    def parts() -> Iterator[str]:
        yield f'<path d="M{LEFT} {BOTTOM}H{RIGHT}" stroke="{GRID}"/>'
        for mark in _marks(low_y, high_y):
            y = at(low_x, mark)[1]
            yield f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="{GRID}"/>'
            yield text(LEFT - 5, y + 4, short(mark), FAINT, anchor="end")
        for mark in _marks(low_x, high_x):
            x = at(mark, low_y)[0]
            yield f'<path d="M{x:.1f} {BOTTOM}v4" stroke="{GRID}"/>'
            yield text(x, BOTTOM + 15, short(mark), FAINT, anchor="middle")
        begins = max(low_x, low_y / nbytes)
        roof = [at(begins, begins * nbytes), at(ridge, operations), at(high_x, operations)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in roof)
        yield f'<path d="M{path}" fill="none" stroke="{FAINT}" stroke-width="1.8"/>'
        x, y = at(intensity, reached)
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{SECOND}"><title>this job</title></circle>'
        yield from legend([("this job", SECOND), ("ceilings", FAINT)], HEIGHT - 8)
        yield text(RIGHT, HEIGHT - 8, "operations a byte", FAINT, anchor="end")

    return svg(WIDTH, HEIGHT, parts(), title)


def legend(entries: Sequence[tuple[str, str]], y: float) -> Iterator[str]:
    """Draw a dot and a name for each (name, colour), in one line."""
    x = float(LEFT)
    for name, colour in entries:
        yield f'<circle cx="{x + 4:.1f}" cy="{y - 4:.1f}" r="4" fill="{colour}"/>'
        yield text(x + 13, y, name, INK)
        x += 30 + 6.2 * len(name)


def text(x: float, y: float, shown: str, fill: str, anchor: str = "start", more: str = "") -> str:
    """Write text at a point; `more` are further attributes."""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" text-anchor="{anchor}"{more}>{escape(shown)}</text>'


def steps_to(most: float) -> tuple[float, float]:
    """Return (step, end) of an axis from 0: steps of 1, 2 or 5 times a power of ten, 4 to 10 of which reach `most`."""
    if most <= 0:
        return 1.0, 1.0
    power = 10.0 ** math.floor(math.log10(most / 4))
    step = power * max(factor for factor in (1, 2, 5) if factor * power <= most / 4 * (1 + 1e-9))
    return step, step * max(1, math.ceil(most / step * (1 - 1e-9)))


def short(value: float) -> str:
    """Format a number in at most five characters: 0.25, 12, 3.4k, 120M, 2.5T."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _level_lines(step: float, top: float, unit: str) -> Iterator[str]:
    count = round(top / step)
    for i in range(0, count + 1, math.ceil(count / 5)):
        y = _y(i * step, top)
        yield f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="{GRID if i else FAINT}"/>'
        yield text(LEFT - 5, y + 4, short(i * step) + unit, FAINT, anchor="end")


def _time_axis(last: float) -> Iterator[str]:
    """Write round times below the area, in the unit that suits the last one."""
    size, unit = next((each for each in ((3600.0, "h"), (60.0, "min")) if last >= 2 * each[0]), (1.0, "s"))
    step, _ = steps_to(last / size)
    count = math.floor(last / size / step * (1 + 1e-9))
    for i in range(0, count + 1, math.ceil(count / 5) or 1):
        x = _x(i * step * size, last)
        yield f'<path d="M{x:.1f} {BOTTOM}v4" stroke="{FAINT}"/>'
        # At the edges a label in the middle would touch that of the other axis, or leave the picture.
        anchor = "start" if i == 0 else "end" if x > RIGHT - 12 else "middle"
        yield text(x, BOTTOM + 15, f"{i * step:g} {unit}", FAINT, anchor=anchor)


def _marks(low: float, high: float) -> list[float]:
    """Return a few round numbers from `low` to `high`: powers of ten, or also 2 and 5 times these if one lies there."""
    powers = [10.0**i for i in range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)]
    marks = [power for power in powers if low <= power <= high]
    if len(marks) < 2:
        marks = [factor * power for power in powers for factor in (1, 2, 5) if low <= factor * power <= high]
    return marks[:: math.ceil(len(marks) / 4) or 1]


def _x(seconds: float, last: float) -> float:
    return LEFT + (RIGHT - LEFT) * (seconds / last if last > 0 else 0.0)


def _y(value: float, top: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * value / top
