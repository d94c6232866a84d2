"""Kernels compiled ahead of time, in processes of their own: in this one Triton's interpreter runs them."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from compile_check import programs
from compile_check import run as script
from compile_check.architectures import ARCHITECTURES, Architecture, Multiprocessor, needs_fp8
from compile_check.figures import CHOSEN, Figures, figure_table
from compile_check.loops import Turn, buffers, copies_in_flight, turn_of
from compile_check.page import Found, table
from repository import ROOT

BENCHMARKS = ROOT / "benchmarks"
SCRIPT = Path(script.__file__)
HOPPER = next(found.gpu for found in ARCHITECTURES if found.name == "sm_90")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=BENCHMARKS, capture_output=True, text=True)


def test_every_module_that_lists_kernels_is_asked() -> None:
    modules = Path(programs.norm_triton.__file__).parent.glob("*_triton.py")
    listing = {path.stem for path in modules if "\ndef shipped(" in path.read_text()}
    assert listing == {module.__name__.rpartition(".")[2] for module in programs.MODULES}
    names = [kernel.name for kernel in programs.kernels(HOPPER)]
    assert len(set(names)) == len(names), "the table has a line a name"


def test_one_configuration_of_each_kernel_compiles_for_hopper() -> None:
    """All of them take over a minute: that is the long test below."""
    assert os.environ["TRITON_INTERPRET"] == "1", "which the script has to undo"
    done = run(str(SCRIPT), "--quick", "--architectures", "sm_90")
    chosen = programs.one_of_each(programs.kernels(HOPPER))
    assert {kernel.kernel.__name__ for kernel in chosen} == {
        kernel.kernel.__name__ for kernel in programs.kernels(HOPPER)
    }
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(chosen)} kernels for 1 architectures" in done.stdout and "0 with faults" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_the_configurations_of_the_figures_compile(architecture: Architecture) -> None:
    """`make compile-check` takes all of them, with whole numbers of every kind, which takes an hour."""
    done = run(str(SCRIPT), "--figures", "--architectures", architecture.name)
    assert done.returncode == 0, done.stdout + done.stderr


SEEDED = """
import os
os.environ["TRITON_INTERPRET"] = "0"
from dataclasses import replace
import triton
from compile_check.architectures import ARCHITECTURES
from compile_check.page import Found, table
from compile_check.programs import check
from batchinfer.kernels import attention_merge_triton, attention_triton, linear_triton, norm_triton

named = {architecture.name: architecture for architecture in ARCHITECTURES}
hopper, mi300 = named["sm_90"], named["gfx942"]
merge, attention = attention_merge_triton.shipped(hopper.gpu)[0], attention_triton.shipped(hopper.gpu)[0]
norm = norm_triton.shipped(hopper.gpu)[0]
linear = next(kernel for kernel in linear_triton.shipped(hopper.gpu) if kernel.name == "linear, 4096 columns of bf16")
float32 = next(kernel for kernel in linear_triton.shipped(hopper.gpu) if kernel.name == "linear, 4096 columns of fp32")
fixed = triton.jit(linear.kernel.fn, do_not_specialize=["m", "n"])
linear = replace(linear, kernel=fixed)
[measured] = check(hopper, [linear], read=frozenset([linear.name]))
turn = measured.turn.instructions
seeded = [
    (hopper, replace(merge, name="merge")),
    (replace(hopper, gpu=replace(hopper.gpu, shared_bytes=1)), replace(attention, name="large", prefetches=False)),
    (hopper, replace(merge, name="no product", product="bf16")),
    (hopper, replace(linear, name="narrow product", product_rows=16)),
    (hopper, replace(attention, name="spilling", constants=attention.constants | {"BLOCK_M": 128}, warps=1,
                     product_rows=16, prefetches=False)),
    (hopper, replace(merge, name="broken", types=merge.types | {"p_first": "fp32"})),
    (hopper, replace(linear, name="rounding", product=None)),
    (hopper, replace(float32, name="exact", kernel=triton.jit(float32.kernel.fn, do_not_specialize=["m", "n"]))),
    (mi300, replace(float32, name="exact elsewhere", kernel=fixed)),
    (hopper, replace(linear, name="ahead", prefetches=True)),
    (hopper, replace(linear, name="one buffer", prefetches=True, stages=2)),
    (hopper, replace(linear, name="no copies", prefetches=True, stages=1)),
    (mi300, replace(linear, name="no such copies", prefetches=True)),
    (hopper, replace(linear, name="long enough", most_instructions=turn)),
    (hopper, replace(linear, name="too long", most_instructions=turn - 1)),
    (hopper, replace(norm, name="no loop", types=norm.types, most_instructions=1)),
]
rows = [row for architecture, kernel in seeded for row in check(architecture, [kernel], ("any",))]
print(*rows, sep="\\n")
print(table([kernel for _, kernel in seeded], rows, [Found.of("Triton 9", rows)], None))
"""


def test_faults_are_found() -> None:
    done = run("-c", SEEDED)
    assert done.returncode == 0, done.stderr
    count = SEEDED.count(", name=")
    lines = done.stdout.splitlines()[:count]
    found = {kernel.partition(", ")[0]: said for kernel, _, said in (line.partition(": ") for line in lines)}
    assert len(found) == count
    fine = {"merge", "exact", "exact elsewhere", "ahead", "no such copies", "long enough"}
    assert {name for name, said in found.items() if said == "no fault"} == fine
    assert re.fullmatch(r"shared memory [\d,]+ above 1", found["large"])
    assert re.fullmatch(r"no mma\S+", found["no product"])
    assert re.fullmatch(r"wgmma\S+ instead of mma\S+", found["narrow product"])
    assert re.match(r"\d+ bytes spilled", found["spilling"])
    assert re.fullmatch(r"does not compile: .+", found["broken"])
    assert re.fullmatch(r"wgmma\S+, where matrix units would round", found["rounding"])
    assert found["one buffer"] == "loads nothing ahead: async_wait of 0"
    assert found["no copies"] == "loads nothing ahead: no asynchronous copy"
    assert re.fullmatch(r"(\d+) instructions a turn above (\d+)", found["too long"])
    assert found["no loop"] == "no loop whose instructions could be counted"
    page = done.stdout.splitlines()[count:]
    faults = page[page.index("## Faults") + 2 : page.index("## Gaps") - 1]
    assert faults == [f"- {line} (Triton 9)" for line in lines if not line.endswith(": no fault")]


SPECIALIZED = """
import os
os.environ["TRITON_INTERPRET"] = "0"
from dataclasses import replace
import triton
from compile_check.programs import specialized
from batchinfer.kernels import linear_triton
from batchinfer.kernels.gpu import INTERPRETED

linear = linear_triton.shipped(INTERPRETED)[0]
for fixed in ([], ["m"], ["m", "n"]):
    print(specialized(replace(linear, kernel=triton.jit(linear.kernel.fn, do_not_specialize=fixed))))
"""


def test_integers_that_a_launch_does_not_specialize_are_not_varied() -> None:
    done = run("-c", SPECIALIZED)
    assert done.stdout.splitlines() == ["['m', 'n']", "['n']", "[]"], done.stderr


def test_the_turn_of_the_loop_with_the_products_is_counted() -> None:
    """Neither the outer loop, nor the longer one without products, nor the trap's branch to itself."""
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00000a0000017a02 */
                                                            /* 0x000fe40000000f00 */
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0030*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0040*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0050*/              @!P0 BRA 0x20 ;
        /*0060*/                   HGMMA.64x32x16.F32.BF16 R88, gdesc[UR8], R88, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/               @P0 BRA 0x60 ;
        /*0090*/               @P6 BRA 0xb0 ;
        /*00a0*/                   BRA.U UP0, 0x10 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
    """
    assert turn_of(sass) == Turn(instructions=3, products=1, waits=1)
    assert turn_of(sass.replace("BRA 0x60", "NOP")) == Turn(instructions=4, products=0, waits=0)
    assert turn_of("        /*0000*/                   EXIT ;") is None


def test_waits_and_buffers_are_those_of_innermost_loops_and_matrices() -> None:
    ttgir = """
    %page = ttg.local_alloc : () -> !ttg.memdesc<1x64xi32, #shared1, #smem, mutable>
    %b_q = ttg.local_alloc %q : (tensor<16x128xbf16, #blocked1>) -> !ttg.memdesc<16x128xbf16, #shared, #smem>
    %b_k = ttg.local_alloc : () -> !ttg.memdesc<3x128x64xi8, #shared2, #smem, mutable>
    %b_v = ttg.local_alloc : () -> !ttg.memdesc<2x64x128xi8, #shared3, #smem, mutable>
    %first = ttg.async_wait %a {num = 0 : i32}
    scf.for %i = %c0 to %c9 step %c1  : i32 {
      %second = ttg.async_wait %a {num = 1 : i32}
      %sum:2 = scf.for %j = %c0 to %c9 step %c1 iter_args(%x = %y) -> (i32)  : i32 {
        %third = ttg.async_wait %a, %b {num = 2 : i32} loc(#loc)
        scf.if %p {
          %fourth = ttg.async_wait %a {num = 3 : i32}
        } loc(#loc)
      } loc(#loc)
      %fifth = ttg.async_wait {num = 4 : i32}
    } loc(#loc)
    """
    assert copies_in_flight(ttgir) == [2, 3]
    assert buffers(ttgir) == 2
    assert buffers("") is None and copies_in_flight("") == []


def test_programs_fit_as_in_published_examples() -> None:
    """CUDA's best practices guide: 37 registers, and 128 or 320 threads, on a GPU of compute capability 7.0."""
    volta = Multiprocessor(programs=32, threads=2048, shared_bytes=96 << 10)
    assert volta.resident(4, 37, 0) == 12
    assert volta.resident(10, 37, 0) == 4
    assert volta.resident(1, 32, 0) == 32 and volta.resident(16, 32, 0) == 4
    assert volta.resident(4, 32, 47 << 10) == 2 and volta.resident(4, 32, (47 << 10) + 1) == 1


BEFORE = Figures("sample", "sm_90", "4096, 32 warps, 2 stages", 50, 0, 1040, 655, None, 0, 3, 2)


def test_figures_stand_beside_those_before() -> None:
    """A change has an arrow; a kernel that is new, or gone, is named."""
    now = [replace(BEFORE, registers=40, shared_bytes=2048, buffers=2), replace(BEFORE, architecture="sm_80")]
    gone = replace(BEFORE, architecture="sm_89")
    heading, _, *lines = figure_table(now, [BEFORE, gone])
    columns = [cell.strip() for cell in heading.strip("|").split("|")]
    cells = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert dict(zip(columns, cells, strict=True)) == {
        "kernel": "sample",
        "architecture": "sm_90",
        "tile": "4096, 32 warps, 2 stages",
        "registers": "50 → 40",
        "spilled": "0",
        "shared": "1,040 → 2,048",
        "instructions": "655",
        "buffers": "- → 2",
        "in flight": "0",
        "waits": "3",
        "programs": "2",
    }
    assert lines[1].startswith("| sample (new) | sm_80 |")
    assert lines[2:] == ["", "Only before: sample on sm_89."]


def test_figures_of_another_triton_are_no_figures_before() -> None:
    before = Found("Triton 3.7.1; yesterday", "", [], [replace(BEFORE, registers=50)])
    for version, said in (("3.7.1", "| 50 → 40 |"), ("3.6.0", "| 40 |")):
        lines = Found(f"Triton {version}; today", "", [], [replace(BEFORE, registers=40)]).figure_table(before)
        assert said in lines[-1]


def test_every_pattern_of_the_figures_is_that_of_a_kernel() -> None:
    names = [kernel.name for kernel in programs.kernels(HOPPER)]
    assert [pattern for pattern in CHOSEN if not any(re.fullmatch(pattern, name) for name in names)] == []


def test_another_triton_checks_too_and_figures_are_kept(tmp_path: Path) -> None:
    """The folder's Triton is the installed one under another version, so that none must be fetched."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(
        f"import sys\nsys.path.remove({str(tmp_path)!r})\ndel sys.modules['triton']\n"
        "import triton\ntriton.__version__ = '9.9.9'\n"
    )
    kept = tmp_path / "found.json"
    chosen = ("--figures", "--architectures", "sm_90", "--kernels", "merge_partials, heads of 128")
    done = run(str(SCRIPT), *chosen, "--also", str(tmp_path), "--json", str(kept))
    assert done.returncode == 0, done.stdout + done.stderr
    versions = re.findall(r"1 programs compiled, 0 with faults. Triton ([\d.]+);", done.stdout)
    assert len(versions) == 2 and versions[0] != "9.9.9" and versions[1] == "9.9.9"
    found = Found.from_json(json.loads(kept.read_text()))
    assert found.to_json() == json.loads(kept.read_text())
    assert [figures.architecture for figures in found.figures] == ["sm_90"]
    more = Found.from_json(json.loads(kept.read_text()))
    more.figures.append(replace(BEFORE, kernel="left out by --kernels"))
    kept.write_text(json.dumps(more.to_json()))
    again = run(str(SCRIPT), *chosen, "--before", str(kept))
    assert (
        again.returncode == 0
        and "left out" not in again.stdout
        and "merge_partials, heads of 128 | sm_90 |" in again.stdout
    )
    assert "→" not in again.stdout and "(new)" not in again.stdout


def test_another_triton_that_fails_is_no_silence(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('broken')\n")
    done = run(str(SCRIPT), "--figures", "--kernels", "merge_partials", "--also", str(tmp_path))
    assert done.returncode == 1 and f"the check with the Triton in {tmp_path} ended with 1" in done.stderr


def test_gaps_are_named_with_the_kernels_that_they_touch() -> None:
    chosen = programs.kernels(HOPPER)
    rows = [programs.Compiled(chosen[0], architecture, "any") for architecture in ARCHITECTURES]
    runs = [Found("Triton 3.7.1; today", "134 kernels", [], []), Found("Triton 3.6.0; today", "133 kernels", [], [])]
    found = table(chosen, rows, runs, None)
    fp8 = sum(map(needs_fp8, chosen))
    multiplied = sum(kernel.product == "fp8" for kernel in chosen)
    wide = sum(kernel.product == "int8" and kernel.product_rows >= 64 for kernel in chosen)
    assert 0 < multiplied < fp8 and wide
    assert [line for line in found.splitlines() if line.startswith("- ")] == [
        "- 134 kernels. Triton 3.7.1; today.",
        "- 133 kernels. Triton 3.6.0; today.",
        f"- sm_80 has no float8: they are left out ({fp8} kernels).",
        f"- sm_86 has no float8: they are left out ({fp8} kernels).",
        f"- sm_100 multiplies int8 by mma.sync: Triton has no tcgen05.mma for it ({wide} kernels).",
        "- gfx942 widens float8 to float16 and multiplies that: its matrix units take another kind of float8 "
        f"({multiplied} kernels).",
    ]
    assert "| linear_w8a8, 64 rows by 64, 4096 columns of fp8 | - |" in found


def test_compiling_in_the_interpreters_process_says_so() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        programs.check(ARCHITECTURES[0], [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quick", "--write"], "--write puts down the whole table"),
        (["--architectures", "sm_90", "--write"], "--write puts down the whole table"),
        (["--kernels", "norm", "--write"], "--write puts down the whole table"),
        (["--also", "nowhere"], "--also nowhere has no folder triton"),
        (["--architectures", "sm_90,sm_91"], "--architectures has sm_91; known are sm_80"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit):
        script.main()
    assert said in capsys.readouterr().err
