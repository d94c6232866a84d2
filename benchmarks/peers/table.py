"""The measurements of a run as one Markdown page."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from workload import SHAPE_DIR, Rates, Shape, Workload

HEADER = ["engine", "setting", "prefill", "decode", "total", "spread", "of ceiling", "ours / this"]


@dataclass(frozen=True)
class Row:
    """All runs of a workload on one engine with one setting: at least one."""

    workload: Workload
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


def page(rows: list[Row], ours: str, conditions: dict[str, Any]) -> str:
    """What was measured on, then for each workload the table and our settings against each peer's best.

    Args:
        ours: the engine whose first row of a workload the others are compared with.
    """
    parts = ["# batchinfer beside its peers", _about(conditions)]
    for workload in dict.fromkeys(row.workload for row in rows):
        of_workload = [row for row in rows if row.workload == workload]
        first = next((row for row in of_workload if row.engine == ours), None)
        cells = [HEADER, ["---"] * 2 + ["---:"] * 6]
        cells += [_cells(row, first, conditions["ceiling_operations_per_second"]) for row in of_workload]
        title = f"## {workload.num_prompts} x {workload.input_len} x {workload.output_len}"
        parts += [title, "\n".join("| " + " | ".join(line) + " |" for line in cells), *_summary(of_workload, ours)]
    return "\n\n".join(parts) + "\n"


def _cells(row: Row, ours: Row | None, ceiling: float) -> list[str]:
    totals = [run.total for run in row.runs]
    operations_per_token = Shape.load().operations(row.workload) / row.workload.tokens
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


def _about(conditions: dict[str, Any]) -> str:
    turns = conditions["turns"]
    lines = [
        f"Rows x prompt tokens x new tokens, shape `{SHAPE_DIR.name}` with random weights. Tokens per second, loading "
        f"excluded: {'one run each' if turns == 1 else f'median of at most {turns} runs'}, in turns; spread is the "
        "slowest and the fastest total. How each number is taken: `benchmarks/README.md`. Jobs with templates, "
        "ShareGPT's lengths or few rows, beside OpenVINO: `offline.md`.",
        "",
        f"- {conditions['date']}, {conditions['commit']}; {conditions['progress']}",
        f"- {conditions['machine']}, {conditions['memory_bytes'] / 2**30:.0f} GiB, {conditions['system']}; load "
        f"average before the run {conditions['load_average']:.2f}",
        f"- ceiling: {conditions['ceiling_operations_per_second'] / 1e9:.0f} int8 GOP/s by the fastest exact product, "
        "of torch's and ours",
        *(f"- {version}" for version in conditions["peers"]),
        *(f"- {failure}" for failure in conditions["failures"]),
    ]
    return "\n".join(lines)


def _summary(rows: list[Row], ours: str) -> list[str]:
    """Return a sentence for each setting of ours: how it compares with each peer's best."""
    best = {row.engine: row for row in sorted(rows, key=lambda row: row.total) if row.engine != ours}
    return [
        f"{ours} {row.setting} runs at "
        + ", ".join(f"{row.total / peer.total:.2f} times {peer.engine} ({peer.setting})" for peer in best.values())
        + "."
        for row in rows
        if row.engine == ours and best
    ]
