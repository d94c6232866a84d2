"""The kernels in C under AddressSanitizer and UndefinedBehaviorSanitizer: their own tests, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_kernels import architecture, compile_into, system_compiler
from repository import ROOT

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]

# Sets the folder before tests ask which libraries there are.
PLUGIN = """
from pathlib import Path
from batchinfer.kernels import cpu_library
assert list(cpu_library.FOLDER.glob("*_cpu.c"))
cpu_library.FOLDER = Path(__file__).parent
assert cpu_library.cpu_path() != "reference"
"""


@pytest.mark.long(minutes=5)
def test_kernels_in_c_touch_no_memory_but_their_own_and_have_defined_results(tmp_path: Path) -> None:
    compiler = system_compiler() if architecture() else None
    runtime = compiler and _runtime(compiler)
    if not compiler or not runtime:
        assert "CI" not in os.environ, "no C compiler with AddressSanitizer is here"
        pytest.skip("no C compiler with AddressSanitizer is here")
    assert list(compile_into(tmp_path, compiler, architecture(), *SANITIZERS)) == []
    (tmp_path / "sanitized.py").write_text(PLUGIN)
    tests = sorted(map(str, ROOT.glob("tests/kernels/test_*_cpu.py")))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "sanitized", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env=os.environ
        | {
            "PYTHONPATH": str(tmp_path),
            "LD_PRELOAD": runtime,
            "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps memory until it ends
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert " passed" in done.stdout, done.stdout


def _runtime(compiler: list[str]) -> str | None:
    """Return the sanitizer's library, which must be loaded before Python; None if the compiler has none."""
    name = "libasan.so"
    said = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return None if said in ("", name) else said
