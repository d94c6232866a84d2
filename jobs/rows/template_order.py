"""`TemplateLines`: a prompt template line by line, and which of its lines may change places."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from batchinfer.jobs.rows.prompts import parse_template

Line = tuple[tuple[str, str | None], ...]  # pairs as of `parse_template`


@dataclass(frozen=True)
class TemplateLines:
    """A prompt template, line by line."""

    lines: tuple[Line, ...]
    ends: tuple[str, ...]  # what ends each line; nothing ends the last one

    @staticmethod
    def of(template: str) -> "TemplateLines":
        """Split a template. A line ends outside of braces, since a column's name may hold any sign. Raises `UsageError`
        as `parse_template` does."""
        lines: list[list[tuple[str, str | None]]] = [[]]
        ends = []
        for literal, name in parse_template(template):
            *whole, last = re.split(r"(\r?\n)", literal)
            for text, end in zip(whole[::2], whole[1::2], strict=True):
                lines[-1] += [(text, None)] if text else []
                ends.append(end)
                lines.append([])
            lines[-1] += [(last, name)] if last or name is not None else []
        return TemplateLines(tuple(map(tuple, lines)), (*ends, ""))

    @property
    def runs(self) -> list[list[int]]:
        """The runs of lines, as indices, that may change places with each other, in the order of the template.

        Lines with fields are a run if they follow one another, or if each stands alone and as many blank lines part
        them. What stands between two runs says what is meant by the second one, so that no line leaves its run.
        """
        runs: list[list[int]] = []
        for index in (i for i, line in enumerate(self.lines) if _fields_in(line)):
            if runs and index == runs[-1][-1] + 1:
                runs[-1].append(index)
            else:
                runs.append([index])
        joined: list[list[int]] = []
        for run in runs:
            last = joined[-1] if joined else []
            alone = len(run) == 1 and bool(last)
            apart = run[0] - last[-1] if alone else 0
            even = apart > 1 and all(b - a == apart for a, b in pairwise(last))
            if even and not any(self.lines[last[-1] + 1 : run[0]]):
                last.append(run[0])
            else:
                joined.append(run)
        return joined

    @property
    def fields(self) -> list[str]:
        """The names of all fields, in the order of the template; one that is used twice is there twice."""
        return [name for line in self.lines for name in _fields_in(line)]

    @property
    def text(self) -> str:
        """The template as one text, as `parse_template` reads it."""
        return "".join(map(str.__add__, map(_written, self.lines), self.ends))

    def reordered(self, orders: Sequence[Sequence[int]]) -> "TemplateLines":
        """Return the template with other lines in the places of each run; what ends a line stays in its place.

        `orders` has, for each run, the indices of its lines in their new order.
        """
        lines = list(self.lines)
        for run, order in zip(self.runs, orders, strict=True):
            for place, index in zip(run, order, strict=True):
                lines[place] = self.lines[index]
        return TemplateLines(tuple(lines), self.ends)

    def has_lines_of(self, other: "TemplateLines") -> bool:
        """Return whether this template is the other one, or is reordered from it."""
        if self.ends != other.ends or self.runs != other.runs:
            return False
        return all(_sorted(self, places) == _sorted(other, places) for places in [*self.runs, *_others(self)])


def _others(template: TemplateLines) -> list[list[int]]:
    """Return the lines that stay where they are, each as a run of its own."""
    movable = {index for run in template.runs for index in run}
    return [[index] for index in range(len(template.lines)) if index not in movable]


def _sorted(template: TemplateLines, places: list[int]) -> list[str]:
    return sorted(_written(template.lines[index]) for index in places)


def _fields_in(line: Line) -> list[str]:
    return [name for _, name in line if name is not None]


def _written(line: Line) -> str:
    texts = [(text.replace("{", "{{").replace("}", "}}"), name) for text, name in line]
    return "".join(text if name is None else f"{text}{{{name}}}" for text, name in texts)
