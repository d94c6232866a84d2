"""What the innermost loops of a compiled kernel do: read from machine code, and from Triton's last GPU dialect."""

import re
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*)")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*;")
_LOOP = re.compile(r"^(\s*)(?:%\S+ = )?scf\.(?:for|while)\b")
_LOOP_END = re.compile(r"^(\s*)\}(?! do)")


@dataclass(frozen=True)
class Turn:
    """One turn of a loop in machine code, in instructions of a warp."""

    instructions: int
    products: int  # of them, those on matrix units
    waits: int  # of them, those that wait for a matrix unit that works beside the warp


def turn_of(sass: str) -> Turn | None:
    """Return the turn of the innermost loop with the most matrix products, of these the longest; None without loops.

    `sass` is what `cuobjdump -sass` prints. A loop reaches from the target of a branch backwards to that branch. The
    compiler's own unrolling would count as one turn, and code that it moved out of the loop would not count.
    """
    code = [
        (int(found[1], 16), found[2], found[3]) for line in sass.splitlines() if (found := _INSTRUCTION.match(line))
    ]
    loops: dict[int, int] = {}  # last address by first
    for address, name, operands in code:
        if name.startswith("BRA") and (target := _TARGET.search(operands)) and int(target[1], 16) < address:
            loops[int(target[1], 16)] = address
    turns = []
    for first, last in loops.items():
        if not any(first < inner and end <= last for inner, end in loops.items()):
            names = [name for address, name, _ in code if first <= address <= last]
            products = sum(name.split(".")[0].endswith("MMA") for name in names)
            turns.append(Turn(len(names), products, sum(name.startswith("WARPGROUP.DEPBAR") for name in names)))
    return max(turns, key=lambda turn: (turn.products, turn.instructions), default=None)


def copies_in_flight(ttgir: str) -> list[int]:
    """Return, for each wait for asynchronous copies in an innermost loop, how many groups it leaves in flight."""
    return [int(found) for loop in _innermost(ttgir) for found in re.findall(r"ttg\.async_wait.*?\{num = (\d+)", loop)]


def buffers(ttgir: str) -> int | None:
    """Return the fewest buffers that a matrix has which a loop copies into shared memory; None if there is none."""
    found = re.findall(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x\D", ttgir)
    return min(map(int, found), default=None)


def _innermost(ttgir: str) -> list[str]:
    """Return the text of each loop that has no other in it."""
    found, lines = [], ttgir.splitlines()
    start: int | None = None
    indent = ""
    for i, line in enumerate(lines):
        if loop := _LOOP.match(line):
            start, indent = i, loop[1]
        elif start is not None and (end := _LOOP_END.match(line)) and end[1] == indent:
            found.append("\n".join(lines[start:i]))
            start = None
    return found
