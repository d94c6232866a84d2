"""Every Triton kernel in every configuration that is shipped, compiled for every architecture, where there is no GPU.

    python benchmarks/compile_check/run.py [--architectures sm_90,gfx942] [--quick | --figures] [--kernels PATTERN]
        [--also FOLDER] [--json FILE] [--before FILE] [--write]

Prints how much was compiled, and fails, with a line for each, on
- a spill, or more shared memory than the architecture has;
- a product that is not computed by the instruction that it should be, or on a matrix unit where that would round;
- a loop that waits for all its loads, in a kernel that says that it loads ahead;
- a loop with more instructions than its kernel says.
What an architecture lacks is no fault but a gap, which the table names.

`--quick` takes one configuration of each kernel and kind of product. `--figures` takes those whose figures are shown,
and prints them, beside those that `--json` wrote before. `--also` does the same with another version of Triton, which
`pip install --no-deps --target FOLDER triton==X.Y.Z` has put into a folder. `--write` puts the page into
`benchmarks/results`. What was compiled before comes out of Triton's cache.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
from compile_check import figures
from compile_check.architectures import ARCHITECTURES
from compile_check.page import Found, table
from compile_check.programs import INTEGERS, Compiled, check, kernels, one_of_each
from conditions import conditions

from batchinfer.kernels.shipped_triton import Shipped

RESULTS = Path(__file__).resolve().parents[1] / "results" / "compile_check.md"


def main() -> None:
    """Compile, print, and fail where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [architecture.name for architecture in ARCHITECTURES]
    parser.add_argument("--architectures", help="names, with commas between; all of them if not given")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--figures", action="store_true")
    parser.add_argument("--kernels", default="", metavar="PATTERN", help="those whose name it is found in")
    parser.add_argument("--any-integers", action="store_true", help="none that are known to be multiples of 16, or 1")
    parser.add_argument("--also", type=Path, metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--before", type=Path, metavar="FILE")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    asked = (args.architectures or ",".join(figures.ARCHITECTURES if args.figures else names)).split(",")
    if unknown := set(asked) - set(names):
        parser.error(f"--architectures has {', '.join(sorted(unknown))}; known are {', '.join(names)}")
    if args.write and (args.quick or args.figures or args.kernels or args.any_integers or args.architectures):
        parser.error("--write puts down the whole table: it goes with nothing that leaves kernels out")
    if args.also and not (args.also / "triton").is_dir():
        parser.error(f"--also {args.also} has no folder triton")
    if triton.knobs.runtime.interpret:  # it is too late to change that in here
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": "0"})
    here = conditions()
    run = f"Triton {triton.__version__}; {here['commit']}; {here['date']}"
    before = Found.from_json(json.loads(args.before.read_text())) if args.before else None
    if before is not None:
        before.figures[:] = [
            was for was in before.figures if was.architecture in asked and re.search(args.kernels, was.kernel)
        ]
    also = [_with_other_triton(args)] if args.also else []
    chosen: dict[str, Shipped] = {}
    rows: list[Compiled] = []
    for architecture in ARCHITECTURES:
        if architecture.name in asked:
            began = time.monotonic()
            shipped = [kernel for kernel in kernels(architecture.gpu) if re.search(args.kernels, kernel.name)]
            shown = [kernel for kernel in shipped if figures.chosen(kernel)]
            if args.figures:
                shipped = shown
            elif args.quick:
                shipped = one_of_each(shipped)
            chosen = {kernel.name: kernel for kernel in shipped} | chosen
            integers = INTEGERS[:1] if args.any_integers or args.figures else INTEGERS
            read = frozenset(kernel.name for kernel in shown if architecture.name in figures.ARCHITECTURES)
            rows += (found := check(architecture, shipped, integers, read))
            seconds = time.monotonic() - began
            print(f"{architecture.name}: {len(found)} programs, {seconds:.0f} s", file=sys.stderr, flush=True)
    runs = [Found.of(run, rows), *also]
    if args.json:
        args.json.write_text(json.dumps(runs[0].to_json(), indent=1) + "\n")
    if args.write:
        RESULTS.write_text(table([*chosen.values()], rows, runs, before))
    for found in runs:
        if args.figures:
            print(*found.figure_table(before), "", sep="\n")
        print(*found.faults, f"{found.count}. {found.run}", sep="\n")
    sys.exit(any(found.faults for found in runs))


def _with_other_triton(args: argparse.Namespace) -> Found:
    """Return what a run of this file finds with the Triton in the folder `args.also`."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--json", str(kept), "--kernels", args.kernels]
        command += ["--architectures", args.architectures] if args.architectures else []
        command += [
            f"--{name.replace('_', '-')}" for name in ("quick", "figures", "any_integers") if getattr(args, name)
        ]
        path = os.pathsep.join(filter(None, [str(args.also.resolve()), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL)
        if not kept.exists():
            raise RuntimeError(f"the check with the Triton in {args.also} ended with {done.returncode}, and no result")
        return Found.from_json(json.loads(kept.read_text()))


if __name__ == "__main__":
    main()
