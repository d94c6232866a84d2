"""The measurements of a run as one Markdown page."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from workload import INPUT_LEN, NUM_PROMPTS, OUTPUT_LEN, Rates, Shape

HEADER = ["engine", "setting", "prefill", "decode", "total", "spread", "of ceiling", "ours / this"]


@dataclass(frozen=True)
class Row:
    """All runs of one engine with one setting."""

    engine: str
    setting: str
    runs: tuple[Rates, ...]

    @property
    def prefill(self) -> float:
        return median(run.prefill for run in self.runs)

    @property
    def decode(self) -> float:
        return median(run.decode for run in self.runs)

    @property
    def total(self) -> float:
        return median(run.total for run in self.runs)


def page(rows: list[Row], ours: Row | None, conditions: dict[str, Any]) -> str:
    """The table, what it was measured on, and `ours` against the best setting of each peer.

    Args:
        ours: the row that the others are compared with; None where it was not measured.
    """
    ceiling = conditions["ceiling_operations_per_second"]
    cells = [HEADER, ["---"] * 2 + ["---:"] * 6, *(_cells(row, ours, ceiling) for row in rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in cells)
    return "\n\n".join(["# batchinfer beside its peers", _about(rows, conditions), table, *_summary(rows, ours)]) + "\n"


def _cells(row: Row, ours: Row | None, ceiling: float) -> list[str]:
    totals = [run.total for run in row.runs]
    operations_per_token = Shape.load().workload_operations / (NUM_PROMPTS * (INPUT_LEN + OUTPUT_LEN))
    return [
        row.engine,
        row.setting,
        f"{row.prefill:.0f}",
        f"{row.decode:.0f}",
        f"{row.total:.0f}",
        f"{min(totals):.0f} to {max(totals):.0f}",
        f"{row.total * operations_per_token / ceiling:.0%}",
        f"{ours.total / row.total:.2f}" if ours else "",
    ]


def _about(rows: list[Row], conditions: dict[str, Any]) -> str:
    machine = conditions["machine"]
    lines = [
        f"{NUM_PROMPTS} prompts of {INPUT_LEN} tokens, {OUTPUT_LEN} new tokens each, shape "
        f"`{conditions['shape']}` with random weights. Tokens per second, median of {len(rows[0].runs)} runs in turns; "
        "spread is the slowest and the fastest total. How each number is taken: `benchmarks/README.md`. Jobs with "
        "templates, ShareGPT's lengths or few rows, beside OpenVINO: `offline.md`.",
        f"- {conditions['date']}, commit {conditions['commit']}",
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['system']}; load average before the run {machine['load_average']:.2f}",
        f"- ceiling: {conditions['ceiling_operations_per_second'] / 1e9:.0f} int8 GOP/s by torch's own product",
        *(f"- {version}" for version in conditions["versions"]),
    ]
    return "\n".join([lines[0], "", *lines[1:]])


def _summary(rows: list[Row], ours: Row | None) -> list[str]:
    if ours is None:
        return []
    best = {}
    for row in sorted(rows, key=lambda row: row.total):
        best[row.engine] = row
    ratios = [
        f"{ours.total / row.total:.2f} times {row.engine} ({row.setting})"
        for row in best.values()
        if row.engine != ours.engine
    ]
    return [f"{ours.engine} {ours.setting} runs at " + ", ".join(ratios) + "."] if ratios else []
