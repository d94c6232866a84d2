"""The page: what was compiled, with what faults and gaps, and a line for each kernel."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from compile_check.architectures import WIDE, Architecture
from compile_check.figures import LEGEND, Figures, figure_table, figures_of
from compile_check.programs import Compiled

from batchinfer.kernels.shipped_triton import Shipped


@dataclass(frozen=True)
class Found:
    """What a run found out, as it is kept in a file."""

    run: str  # version of Triton, commit and date
    count: str
    faults: list[str]
    figures: list[Figures]

    @classmethod
    def of(cls, run: str, rows: list[Compiled]) -> "Found":
        """Put together what the rows say."""
        return cls(run, count(rows), [str(row) for row in rows if row.faults], figures_of(rows))

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> "Found":
        """Make it from what `to_json` gave."""
        return cls(**kept | {"figures": [Figures(**figures) for figures in kept["figures"]]})

    @property
    def triton(self) -> str:
        """The version of Triton, in words."""
        return self.run.partition(";")[0]

    def figure_table(self, before: "Found | None") -> list[str]:
        """Return the figures as Markdown, beside those before if the same Triton made them."""
        return figure_table(self.figures, before.figures if before and before.triton == self.triton else [])

    def to_json(self) -> dict[str, Any]:
        """Return what a JSON file can hold."""
        return asdict(self)


def count(rows: list[Compiled]) -> str:
    """How much was compiled, and with how many faults, in words."""
    wrong = sum(bool(row.faults) for row in rows)
    kernels, architectures = {row.kernel.name for row in rows}, {row.architecture.name for row in rows}
    return (
        f"{len(kernels)} kernels for {len(architectures)} architectures: "
        f"{len(rows):,} programs compiled, {wrong} with faults"
    )


def table(chosen: list[Shipped], rows: list[Compiled], runs: list[Found], before: Found | None) -> str:
    """Markdown: what came out, the gaps, the instructions of products, figures, and a line for each of the kernels.

    `runs` is what this run found and what another version of Triton made of the same kernels; `before` is what an
    earlier run found.
    """
    architectures = list({row.architecture.name: row.architecture for row in rows}.values())
    return "\n".join(
        [
            "# Kernels compiled ahead of time",
            "",
            *[f"- {found.count}. {found.run}." for found in runs],
            "",
            "Nothing here ran.",
            "",
            *_fault_lines(runs),
            "## Gaps",
            "",
            *_gap_lines(chosen, architectures),
            "",
            "## Products",
            "",
            "| architecture | product | rows | instructions | kernels |",
            "|---|---|---|---|---:|",
            *_product_lines(rows),
            "",
            *_figure_lines(runs, before),
            "## Kernels",
            "",
            "Registers of a thread and KiB of shared memory of a program, the most for whole numbers of any kind; bold",
            "where there is a fault, - where the architecture lacks a type.",
            "",
            *_kernel_lines(chosen, architectures, rows),
            "",
        ]
    )


def _fault_lines(runs: list[Found]) -> list[str]:
    wrong = [f"- {fault} ({found.triton})" for found in runs for fault in found.faults]
    return ["## Faults", "", *wrong, ""] if wrong else []


def _figure_lines(runs: list[Found], before: Found | None) -> list[str]:
    lines = ["## Figures", "", LEGEND, ""]
    if before is not None:
        lines += [f"Left of an arrow: {before.run}.", ""]
    for found in runs:
        lines += [f"With {found.triton}:", "", *found.figure_table(before), ""]
    return lines


def _gap_lines(chosen: list[Shipped], architectures: list[Architecture]) -> list[str]:
    lines = []
    for architecture in architectures:
        for product, gap in architecture.gaps.items():
            touched = sum(architecture.touches(product, kernel) for kernel in chosen)
            lines.append(f"- {architecture.name} {gap} ({touched} kernels).")
    return lines


def _product_lines(rows: list[Compiled]) -> list[str]:
    found: dict[tuple[str, str, str], list[Compiled]] = defaultdict(list)
    for row in rows:
        if row.kernel.product is not None:
            tile = f"{WIDE} and more" if row.kernel.product_rows >= WIDE else "fewer"
            found[row.architecture.name, row.kernel.product, tile].append(row)
    lines = []
    for (architecture, product, tile), group in found.items():
        instructions = sorted({instruction for row in group for instruction in row.instructions})
        kernels = len({row.kernel.name for row in group})
        lines.append(f"| {architecture} | {product} | {tile} | {'<br>'.join(instructions)} | {kernels} |")
    return lines


def _kernel_lines(chosen: list[Shipped], architectures: list[Architecture], rows: list[Compiled]) -> list[str]:
    names = [architecture.name for architecture in architectures]
    cells: dict[tuple[str, str], list[Compiled]] = defaultdict(list)
    for row in rows:
        cells[row.kernel.name, row.architecture.name].append(row)
    lines = [f"| kernel | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for kernel in chosen:
        lines.append(f"| {kernel.name} | {' | '.join(_cell(cells[kernel.name, name]) for name in names)} |")
    return lines


def _cell(rows: list[Compiled]) -> str:
    if not rows:
        return "-"
    cell = f"{max(row.registers for row in rows)}, {max(row.shared_bytes for row in rows) / 1024:.1f}"
    return f"**{cell}**" if any(row.faults for row in rows) else cell
