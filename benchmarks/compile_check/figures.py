"""Figures of a few configurations, beside those of an earlier run: what it costs to go once through a kernel's loop."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from compile_check.programs import Compiled

from batchinfer.kernels.shipped_triton import Shipped

ARCHITECTURES = ("sm_80", "sm_89", "sm_90")
CHOSEN = (
    r"attention, (few|many) tokens, 4 heads of 128 to a key head, queries in bf16, cache in (bf16|i8|fp8e4nv)",
    r"merge_partials, heads of 128",
    r"linear_w4a16, up to (16|any number of) rows, 4096 columns of bf16 in groups of 128",
    r"linear_w8a8, \d+ rows by \d+, 4096 columns of (int8|fp8)",
    r"linear, 4096 columns of (bf16|fp32)",
    r"sample",
    r"norm, 4096 columns of bf16 to (bf16|i8)",
    r"rotate_and_store, heads of 128, cache in (bf16|i8)",
    r"silu_mul, 16384 columns of bf16 to i8",
)
"""Patterns of the names of the kernels whose figures are shown."""
_COLUMNS = {
    "registers": "registers",
    "spilled_bytes": "spilled",
    "shared_bytes": "shared",
    "instructions": "instructions",
    "buffers": "buffers",
    "in_flight": "in flight",
    "waits": "waits",
    "programs": "programs",
}
LEGEND = """\
The tile is the program's BLOCK sizes, its warps and stages. Registers of a thread; bytes spilled; bytes of shared
memory; a warp's instructions for a turn of the innermost loop, which is one tile of keys or of an operand's columns;
buffers of the operands that the loop loads; groups of copies still in flight when it waits for the next; waits for a
matrix unit in a turn; programs that fit on a multiprocessor. A - means that there is no such loop, load or wait."""


@dataclass(frozen=True)
class Figures:
    """What came out for one kernel on one architecture, for whole numbers of any kind."""

    kernel: str
    architecture: str
    tile: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: int | None  # of a turn of the innermost loop
    buffers: int | None
    in_flight: int | None
    waits: int | None
    programs: int  # that fit on a multiprocessor


def chosen(kernel: Shipped) -> bool:
    """Whether the kernel's figures are shown."""
    return any(re.fullmatch(pattern, kernel.name) for pattern in CHOSEN)


def figures_of(rows: Iterable[Compiled]) -> list[Figures]:
    """Return the figures of the rows whose machine code was read for them, kernel by kernel."""
    found = [
        _figures(row)
        for row in rows
        if chosen(row.kernel) and row.architecture.name in ARCHITECTURES and row.integers == "any" and row.registers
    ]
    order = {name: place for place, name in enumerate(dict.fromkeys(figures.kernel for figures in found))}
    return sorted(found, key=lambda figures: order[figures.kernel])


def _figures(row: Compiled) -> Figures:
    kernel, turn = row.kernel, row.turn
    blocks = " x ".join(str(size) for name, size in kernel.constants.items() if name.startswith("BLOCK"))
    assert row.architecture.multiprocessor is not None
    return Figures(
        kernel.name,
        row.architecture.name,
        f"{blocks}, {kernel.warps} warps, {kernel.stages} stages",
        row.registers,
        row.spilled_bytes,
        row.shared_bytes,
        turn.instructions if turn else None,
        row.buffers,
        row.in_flight,
        turn.waits if turn and "wgmma" in "".join(row.instructions) else None,
        row.architecture.multiprocessor.resident(kernel.warps, row.registers, row.shared_bytes),
    )


def figure_table(now: list[Figures], before: list[Figures]) -> list[str]:
    """Return lines of Markdown; where something was another way before, both stand there."""
    earlier = {(figures.kernel, figures.architecture): figures for figures in before}
    lines = [
        f"| kernel | architecture | tile | {' | '.join(_COLUMNS.values())} |",
        "|---|---|---|" + "---:|" * len(_COLUMNS),
    ]
    for figures in now:
        was = earlier.pop((figures.kernel, figures.architecture), None)
        new = " (new)" if before and was is None else ""
        cells = [_cell(figures, was, name) for name in ("tile", *_COLUMNS)]
        lines.append(f"| {figures.kernel}{new} | {figures.architecture} | {' | '.join(cells)} |")
    gone = [f"{name} on {architecture}" for name, architecture in earlier]
    return lines + (["", f"Only before: {'; '.join(gone)}."] if gone else [])


def _cell(now: Figures, was: Figures | None, name: str) -> str:
    values = [getattr(figures, name) for figures in (was, now) if figures is not None]
    shown = ["-" if value is None else f"{value:,}" if isinstance(value, int) else value for value in values]
    return " → ".join(dict.fromkeys(shown))
