"""Compile the kernels in C, a library for each instruction set of this machine's architecture."""

import platform
import shlex
import subprocess
from pathlib import Path

FLAGS = "-O3 -std=gnu11 -fPIC -shared -ffp-contract=off -Wall -Wextra -Werror"
"""Products are fused with sums only where a kernel says so: compilers must not, or bits would follow them."""

SETS = {
    "x86_64": {
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni",
    },
    "aarch64": {"neon": "-march=armv8.2-a+dotprod+fp16"},
}


def main() -> None:
    """Compile into this folder."""
    here = Path(__file__).parent
    sources = sorted(map(str, here.glob("*_cpu.c")))
    for name, flags in SETS[platform.machine()].items():
        command = ["cc", *shlex.split(FLAGS), *flags.split(), *sources, "-o", str(here / f"cpu_{name}.so")]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
