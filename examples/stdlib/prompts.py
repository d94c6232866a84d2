"""A table of real prompts: functions of the running interpreter's held-out modules, signature and docstring in.

    python examples/stdlib/prompts.py -o demo/prompts.parquet

A third of the rows begin with the same two worked functions, a third with the source that precedes the function in its
module, the rest with nothing; a few rows are there twice. `reference` holds the body that a person wrote.
"""

import argparse
import ast
import random
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from corpus import Function, Module, functions, modules
from tokenizers import Tokenizer

HERE = Path(__file__).parent
ROWS = 640
DUPLICATES = 20
MIN_TOKENS, MAX_TOKENS = 20, 1000
WORKED_TOKENS = range(60, 120)  # short enough that two worked functions leave room for the question


@dataclass(frozen=True)
class Prompt:
    """One row: `prompt` ends where the body begins."""

    id: str
    prompt: str
    module: str
    reference: str


class Ruler:
    """Counts tokens as the model sees them, its beginning-of-text included."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def __call__(self, text: str) -> int:
        return len(self.tokenizer.encode(text).ids)

    def fits(self, prompt: Prompt) -> bool:
        return MIN_TOKENS <= self(prompt.prompt) <= MAX_TOKENS


def earlier_siblings(module: Module) -> dict[int, list[int]]:
    """By the line of each function, the first lines of the statements before it in the same block."""
    blocks = [node.body for node in ast.walk(ast.parse(module.text)) if isinstance(node, ast.Module | ast.ClassDef)]
    found: dict[int, list[int]] = {}
    for block in blocks:
        starts = [min([s.lineno, *(d.lineno for d in getattr(s, "decorator_list", []))]) for s in block]
        found |= {s.lineno: starts[:i] for i, s in enumerate(block) if isinstance(s, ast.FunctionDef)}
    return found


def context(lines: list[str], starts: list[int], function: Function, limit: int, ruler: Ruler) -> str:
    """The source before the function, dedented as it is: whole statements, as many as fit in `limit` tokens."""
    text = ""
    for start in reversed(starts):
        longer = textwrap.dedent("".join(lines[start - 1 : function.line - 1]))
        if ruler(longer + function.head) > limit:
            break
        text = longer
    return text


def with_context(module: Module, ruler: Ruler, rng: random.Random) -> Iterator[Prompt]:
    """The module's functions behind source of every length up to the longest prompt's."""
    lines = module.text.splitlines(keepends=True)
    siblings = earlier_siblings(module)
    for f in functions(module):
        before = context(lines, siblings.get(f.line, []), f, rng.randint(100, MAX_TOKENS), ruler)
        if before:
            yield row(f, "context", before)


def row(f: Function, kind: str, before: str = "") -> Prompt:
    return Prompt(f"{f.module}:{f.name}:{f.line}:{kind}", before + f.head, f.module, f.body)


def make_prompts(ruler: Ruler, rng: random.Random) -> list[Prompt]:
    """`ROWS` prompts in random order, the same under one interpreter and one tokenizer."""
    held_out = [m for m in modules() if m.held_out]
    found = [f for m in held_out for f in functions(m)]
    worked = rng.sample([f for f in found if ruler(f.head + f.body) in WORKED_TOKENS], 2)
    header = "".join(f"{f.head}{f.body}\n\n" for f in worked)

    plain = [row(f, "plain") for f in found]
    few_shot = [row(f, "few-shot", header) for f in found if f not in worked]
    contexts = [p for m in held_out for p in with_context(m, ruler, rng)]
    third = ROWS // 3
    chosen: list[Prompt] = []
    for pool, count in (few_shot, third), (contexts, third), (plain, ROWS - 2 * third - DUPLICATES):
        fitting = [p for p in {p.prompt: p for p in pool}.values() if ruler.fits(p)]
        if len(fitting) < count:
            raise SystemExit(
                f"only {len(fitting)} of {count} prompts: this Python has too little of its library's source"
            )
        chosen += rng.sample(fitting, count)
    chosen += [replace(p, id=p.id + ":again") for p in rng.sample(chosen, DUPLICATES)]
    rng.shuffle(chosen)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo/prompts.parquet"))
    parser.add_argument("--tokenizer", type=Path, default=HERE / "target", help="folder of tokenizer.json")
    args = parser.parse_args()
    prompts = make_prompts(Ruler(args.tokenizer), random.Random(0))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([vars(p) for p in prompts]), args.output)
    print(f"{len(prompts)} prompts in {args.output}")


if __name__ == "__main__":
    main()
