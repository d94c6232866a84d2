"""Kernels compiled ahead of time, in processes of their own: in this one Triton's interpreter runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import compile_check
import pytest

HOPPER = next(found.gpu for found in compile_check.ARCHITECTURES if found.name == "sm_90")
SCRIPT = Path(compile_check.__file__)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=SCRIPT.parent, capture_output=True, text=True)


def test_every_module_that_lists_kernels_is_asked() -> None:
    modules = Path(compile_check.norm_triton.__file__).parent.glob("*_triton.py")
    listing = {path.stem for path in modules if "\ndef shipped(" in path.read_text()}
    assert listing == {module.__name__.rpartition(".")[2] for module in compile_check.MODULES}
    names = [kernel.name for kernel in compile_check.kernels(HOPPER)]
    assert len(set(names)) == len(names), "the table has a line a name"


def test_one_configuration_of_each_kernel_compiles_for_hopper() -> None:
    """All of them take over a minute: that is the long test below."""
    assert os.environ["TRITON_INTERPRET"] == "1", "which the script has to undo"
    done = run(str(SCRIPT), "--quick", "--architectures", "sm_90")
    chosen = compile_check.one_of_each(compile_check.kernels(HOPPER))
    assert {kernel.kernel.__name__ for kernel in chosen} == {
        kernel.kernel.__name__ for kernel in compile_check.kernels(HOPPER)
    }
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(chosen)} kernels for 1 architectures" in done.stdout and "0 with faults" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("architecture", compile_check.ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_every_configuration_compiles(architecture: compile_check.Architecture) -> None:
    """`make compile-check` takes those for whole numbers of other kinds too, and twice the time."""
    done = run(str(SCRIPT), "--any-integers", "--architectures", architecture.name)
    assert done.returncode == 0, done.stdout + done.stderr


SEEDED = """
import os
os.environ["TRITON_INTERPRET"] = "0"
from dataclasses import replace
from compile_check import ARCHITECTURES, check, table
from batchinfer.kernels import attention_merge_triton, attention_triton

hopper = next(architecture for architecture in ARCHITECTURES if architecture.name == "sm_90")
merge, attention = attention_merge_triton.shipped(hopper.gpu)[0], attention_triton.shipped(hopper.gpu)[0]
seeded = [
    (hopper, replace(merge, name="merge")),
    (replace(hopper, gpu=replace(hopper.gpu, shared_bytes=1)), replace(attention, name="large")),
    (hopper, replace(merge, name="no product", product="bf16")),
    (hopper, replace(attention, name="narrow product", product_rows=64)),
    (hopper, replace(attention, name="spilling", constants=attention.constants | {"BLOCK_M": 128}, warps=1)),
    (hopper, replace(merge, name="broken", types=merge.types | {"p_first": "fp32"})),
]
rows = [row for architecture, kernel in seeded for row in check(architecture, [kernel])]
print(*rows, sep="\\n")
print(table([kernel for _, kernel in seeded], rows))
"""


def test_faults_are_found() -> None:
    done = run("-c", SEEDED)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[:6]
    found = dict(line.split(", sm_90: ") for line in lines)
    assert [*found] == ["merge", "large", "no product", "narrow product", "spilling", "broken"]
    assert found["merge"] == "no fault"
    assert re.fullmatch(r"shared memory [\d,]+ above 1", found["large"])
    assert re.fullmatch(r"no mma\S+", found["no product"])
    assert re.fullmatch(r"mma\.sync\S+ instead of wgmma\S+", found["narrow product"])
    assert re.fullmatch(r"\d+ bytes spilled", found["spilling"])
    assert re.fullmatch(r"does not compile: .+", found["broken"])
    table = done.stdout.splitlines()[6:]
    assert [line for line in table if line.startswith("- ")] == [f"- {line}" for line in lines[1:]]


def test_gaps_are_named_with_the_kernels_that_they_touch() -> None:
    chosen = compile_check.kernels(HOPPER)
    rows = [compile_check.Compiled(chosen[0], architecture, "any") for architecture in compile_check.ARCHITECTURES]
    found = compile_check.table(chosen, rows)
    fp8 = sum(map(compile_check.needs_fp8, chosen))
    multiplied = sum(kernel.product == "fp8" for kernel in chosen)
    wide = sum(kernel.product == "int8" and kernel.product_rows >= 64 for kernel in chosen)
    assert 0 < multiplied < fp8 and wide
    assert [line for line in found.splitlines() if line.startswith("- ")] == [
        f"- sm_80 has no float8: they are left out ({fp8} kernels).",
        f"- sm_86 has no float8: they are left out ({fp8} kernels).",
        f"- sm_100 multiplies int8 by mma.sync: Triton has no tcgen05.mma for it ({wide} kernels).",
        "- gfx942 widens float8 to float16 and multiplies that: its matrix units take another kind of float8 "
        f"({multiplied} kernels).",
    ]
    assert "| linear_w8a8, 64 rows by 64, 4096 columns of fp8 | - |" in found


def test_compiling_in_the_interpreters_process_says_so() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_check.check(compile_check.ARCHITECTURES[0], [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quick", "--write"], "--write puts down the whole table"),
        (["--architectures", "sm_90", "--write"], "--write puts down the whole table"),
        (["--architectures", "sm_90,sm_91"], "--architectures has sm_91; known are sm_80"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit):
        compile_check.main()
    assert said in capsys.readouterr().err
