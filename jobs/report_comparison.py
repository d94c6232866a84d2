"""What changed between the reports of two jobs, as lines for a terminal and as a page."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from batchinfer.jobs.amounts import in_bytes, in_seconds
from batchinfer.jobs.charts import bars_beside_names
from batchinfer.jobs.report import Report
from batchinfer.jobs.web_page import (
    facts,
    figure,
    figures,
    heading,
    page,
    paragraph,
    points,
    preformatted,
    section,
    table,
)

Shown = tuple[str, str, str, str]
"""(name, first value, second value, how the second differs)."""


class Comparison:
    """Two reports side by side. What is the same in both is left out where it says nothing by itself."""

    def __init__(self, first: Report, second: Report) -> None:
        self._first, self._second = first, second

    def text(self) -> str:
        """Return aligned lines, without colour."""
        lines = [("", self._first.output, self._second.output, ""), *self._figures(), *self._texts()]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        shown = ("  ".join([*map(str.ljust, line[:3], widths), line[3]]) for line in lines)
        notes = [f"- {note}" for note in self._only(self._first, self._second)]
        notes += [f"+ {note}" for note in self._only(self._second, self._first)]
        return "\n".join(line.rstrip() for line in [*shown, *notes])

    def json(self) -> dict[str, Any]:
        """Return both values of all figures by name, and the settings, kernels, versions and notes that differ."""
        return {
            "outputs": [self._first.output, self._second.output],
            "figures": {name.strip(): [value(self._first), value(self._second)] for name, value, _ in FIGURES},
            "changed": {name: [first, second] for name, first, second, _ in self._texts()},
            "only_first": self._only(self._first, self._second),
            "only_second": self._only(self._second, self._first),
        }

    def page(self) -> str:
        """Return a web page."""
        outputs = self._first.output, self._second.output
        title = " and ".join(Path(output).name for output in outputs)
        heads = "", "first", "second"
        phases = {
            name: (self._first.phases.get(name, 0.0), self._second.phases.get(name, 0.0)) for name in self._first.phases
        }
        chart = bars_beside_names("Seconds of each phase", phases, in_seconds)
        return page(
            f"{title}: reports",
            (
                heading(title),
                paragraph("What changed from the first job to the second. A ratio is the second by the first.", "lead"),
                facts(zip(heads[1:], outputs, strict=True)),
                section("Figures", table((*heads, "ratio"), list(self._figures()), 3)),
                section("Where the time went", figures([figure("Phases", chart, "first above, second below")])),
                section("Settings", table(heads, [line[:3] for line in self._texts()])),
                section("Notes of the first only", points(self._only(self._first, self._second))),
                section("Notes of the second only", points(self._only(self._second, self._first))),
                section("Commands", preformatted(self._first.command), preformatted(self._second.command)),
            ),
        )

    def _figures(self) -> Iterator[Shown]:
        for name, value, formatted in FIGURES:
            first, second = value(self._first), value(self._second)
            if first or second:
                yield name, formatted(first), formatted(second), _ratio(first, second)

    def _texts(self) -> Iterator[Shown]:
        pairs = [("model", self._first.model, self._second.model), ("device", self._first.device, self._second.device)]
        for name, of in (("", "settings"), ("kernel ", "kernels"), ("version of ", "versions")):
            before, after = getattr(self._first, of), getattr(self._second, of)
            pairs += [(name + key, str(before.get(key, "")), str(after.get(key, ""))) for key in {**before, **after}]
        for name, first, second in pairs:
            if first != second:
                yield name, first, second, ""

    @staticmethod
    def _only(one: Report, other: Report) -> list[str]:
        """Return the notes that only `one` has."""
        return [note for note in one.notes if note not in other.notes]


def _ratio(first: float, second: float) -> str:
    if not first:
        return "new"
    return f"{second / first:.2f}" if second else "gone"


_count, _rate = "{:,.0f}".format, "{:,.2f}".format


def _phase(name: str) -> Callable[[Report], float]:
    return lambda report: report.phases.get(name, 0.0)


FIGURES: tuple[tuple[str, Callable[[Report], float], Callable[[float], str]], ...] = (
    ("rows", lambda report: report.rows, _count),
    ("rows ok", lambda report: report.rows_ok, _count),
    ("rows failed", lambda report: report.rows_failed, _count),
    ("rows computed", lambda report: report.rows_computed, _count),
    ("prompt tokens", lambda report: report.prompt_tokens, _count),
    ("  computed", lambda report: report.prompt_tokens_computed, _count),
    ("  shared", lambda report: report.prompt_tokens_shared, _count),
    ("completion tokens", lambda report: report.completion_tokens, _count),
    ("  drafted", lambda report: report.drafted, _count),
    ("  accepted", lambda report: report.accepted, _count),
    ("wall time", lambda report: report.wall_seconds, in_seconds),
    ("time of shards", lambda report: report.shard_seconds, in_seconds),
    ("  generating", lambda report: report.generate_seconds, in_seconds),
    *((f"  {name}", _phase(name), in_seconds) for name in ("load", "tokenize", "prefill", "decode", "commit", "merge")),
    ("rows/s", lambda report: report.rows_per_second, _rate),
    ("tokens/s", lambda report: report.tokens_per_second["total"], _rate),
    ("% of the arithmetic", lambda report: report.percent_of_peak or 0.0, _rate),
    ("steps", lambda report: report.steps, _count),
    ("padded tokens", lambda report: report.padded_tokens, _count),
    ("preemptions", lambda report: report.preemptions, _count),
    ("memory of the engine", lambda report: report.peak_memory_bytes.get("engine", 0), in_bytes),
    ("weights", lambda report: report.weight_bytes, in_bytes),
    ("keys and values", lambda report: report.kv_cache_bytes, in_bytes),
)
"""What is compared: (name, value, how it is shown)."""
