"""Compile the kernels in C for the CPU: a library for each instruction set, `kernels/cpu_NAME.so`.

`python building/compile_kernels.py` does so by hand, after a change to the C; installing batchinfer does it too.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent / "kernels"

FLAGS = "-O3 -std=gnu11 -fPIC -shared -ffp-contract=off"
"""Products are fused with sums only where a kernel says so: compilers must not, or bits would follow them."""

SETS = {
    "x86_64": {
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512bw": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl",
        "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni",
    },
    "aarch64": {"neon": "-mcpu=generic+dotprod"},
}
"""The instruction sets of each architecture of Linux that the kernels are written for, and what asks for them."""

PROBE = "#include <stdint.h>\n#include <string.h>\nvoid probe(int8_t *p) { memset(p, 0, 64); }\n"


def architecture() -> str:
    """Return this machine's architecture if there are kernels in C for it, else nothing."""
    machine = platform.machine()
    return machine if sys.platform == "linux" and machine in SETS else ""


def system_compiler() -> list[str] | None:
    """Return the command of a C compiler that works here: `$CC`, cc, gcc or clang."""
    named = [shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"]]
    return next((command for command in named if command and shutil.which(command[0]) and _works(command)), None)


def zig(machine: str, cache: Path) -> list[str]:
    """Return the command of the C compiler in the package `ziglang`, for this architecture.

    Its libraries load with any glibc since 2.17. What it keeps of the C library goes to the folder `cache`.
    """
    kept = [f"ZIG_{kind}_CACHE_DIR={cache}" for kind in ("GLOBAL", "LOCAL")]
    target = ["-target", f"{machine}-linux-gnu.2.17", "-fno-sanitize=undefined"]
    return ["/usr/bin/env", *kept, sys.executable, "-m", "ziglang", "cc", *target]


def compile_kernels() -> list[str]:
    """Compile into `kernels/` in place of what was compiled there before; return lines about what could not be.

    A job that begins meanwhile finds the old libraries or the new ones.
    """
    with tempfile.TemporaryDirectory(dir=KERNELS) as folder:
        lines = _compile_what_can_be(Path(folder))
        made = {library.name: library for library in Path(folder).glob("cpu_*.so")}
        for old in KERNELS.glob("cpu_*.so"):
            if old.name not in made:
                old.unlink()
        for name, library in made.items():
            library.replace(KERNELS / name)
    return lines


def _compile_what_can_be(folder: Path) -> list[str]:
    machine = architecture()
    if not machine:
        return [f"there are no kernels in C for {sys.platform} on {platform.machine()}: torch computes what they would"]
    with tempfile.TemporaryDirectory() as cache:
        package = zig(machine, Path(cache))
        compiler = system_compiler() or (package if _works(package) else None)
        if compiler is None:
            return ["no C compiler was found, so that the kernels in C are not built: torch computes what they would"]
        return list(compile_into(folder, compiler, machine))


def compile_into(folder: Path, compiler: Sequence[str], machine: str, *more: str) -> Iterator[str]:
    """Compile each library of an architecture into a folder with these flags and `more`.

    Yields a line about each instruction set that the compiler does not know.
    """
    sources = sorted(map(str, KERNELS.glob("*_cpu.c")))
    for name, flags in SETS[machine].items():
        output = ["-o", str(folder / f"cpu_{name}.so")]
        done = _run([*compiler, *FLAGS.split(), *flags.split(), *more, *sources, *output])
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), "it says no error")
            yield f"the C compiler does not compile the kernels for {name}, which are left out: {said}"


def _works(compiler: Sequence[str]) -> bool:
    """Whether a compiler makes a library of C that includes the system's headers."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(PROBE)
        return not _run([*compiler, *FLAGS.split(), str(source), "-o", str(source.with_suffix(".so"))]).returncode


def _run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True)


if __name__ == "__main__":
    left_out = compile_kernels()
    sys.exit("\n".join(left_out) or None)
