"""Every Triton kernel in every configuration that is shipped, compiled for every architecture, where there is no GPU.

    python benchmarks/compile_check.py [--architectures sm_90,gfx942] [--quick] [--write]

Prints how much was compiled, and fails, with a line for each, on a spill, on more shared memory than the architecture
has, and on a product that is not computed by the instruction that it should be. What an architecture lacks is no fault
but a gap, which the table names. `--quick` takes one configuration of each kernel and kind of product; `--write` puts
the table into `benchmarks/results`. What was compiled before comes out of Triton's cache.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import triton
from conditions import conditions
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, CompiledKernel

from batchinfer.kernels import (
    activation_triton,
    attention_merge_triton,
    attention_triton,
    kv_cache_triton,
    linear_triton,
    linear_w4a16_triton,
    linear_w8a8_triton,
    norm_triton,
    rows_triton,
    sampling_triton,
)
from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.shipped_triton import Shipped

MODULES = (
    norm_triton,
    activation_triton,
    rows_triton,
    kv_cache_triton,
    sampling_triton,
    attention_triton,
    attention_merge_triton,
    linear_triton,
    linear_w8a8_triton,
    linear_w4a16_triton,
)
RESULTS = Path(__file__).resolve().parent / "results" / "compile_check.md"
INTEGERS = ("any", "multiples of 16", "1")
"""What whole numbers among the arguments are. A launch takes a program of its own for each, so all three are compiled;
that real arguments are a mix of them changes little."""
WIDE = 64
"""The rows from which on a product is one of a whole group of warps, where the architecture has such products."""
TENSOR_COLUMNS = 512
"""Of tensor memory, which sums of tcgen05.mma lie in."""
_PRODUCT = re.compile(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)[\w.:]*")


@dataclass(frozen=True)
class Architecture:
    """What a kernel may use there, and how matrix products look in its assembly."""

    name: str
    target: GPUTarget
    gpu: Gpu
    instructions: dict[str, str]  # by type of product; without "fp8" the type does not exist there
    wide: dict[str, str] = field(default_factory=dict)  # the same for products of `WIDE` rows, where they differ
    gaps: dict[str, str] = field(default_factory=dict)  # by type of product: what is not as one would wish

    def takes(self, kernel: Shipped) -> bool:
        """False if it lacks a type of the kernel's."""
        return "fp8" in self.instructions or not needs_fp8(kernel)

    def expected(self, kernel: Shipped) -> str | None:
        """A pattern of the instruction of the kernel's product."""
        if kernel.product is None:
            return None
        narrow = self.instructions[kernel.product]
        return self.wide.get(kernel.product, narrow) if kernel.product_rows >= WIDE else narrow

    def touches(self, product: str, kernel: Shipped) -> bool:
        """True if the gap in that type of product is one for this kernel."""
        if product not in self.gaps:
            return False
        if not self.takes(kernel):
            return product == "fp8"
        return kernel.product == product and (not self.wide or kernel.product_rows >= WIDE)


def needs_fp8(kernel: Shipped) -> bool:
    """True if one of its types is float8e4nv."""
    return any("fp8e4nv" in kind for kind in kernel.types.values())


def _nvidia(
    capability: int, processors: int, shared_kilobytes: int, wide: dict[str, str], gaps: dict[str, str]
) -> Architecture:
    types = {"bf16": "bf16", "fp16": "f16", "int8": "s8", "fp8": "e4m3"}
    if capability < 89:
        del types["fp8"]
    products = {product: rf"mma\.sync\S*\.{kind}\.{kind}\.\w+" for product, kind in types.items()}
    name, target = f"sm_{capability}", GPUTarget("cuda", capability, 32)
    gpu = Gpu(name, divmod(capability, 10), processors, shared_kilobytes << 10)
    return Architecture(name, target, gpu, products, wide, gaps)


_NO_FP8 = {"fp8": "has no float8: they are left out"}
_WGMMA = {
    product: rf"wgmma\S*\.{kind}\.{kind}"
    for product, kind in (("bf16", "bf16"), ("fp16", "f16"), ("int8", "s8"), ("fp8", "e4m3"))
}
_TCGEN05 = {
    product: rf"tcgen05\.mma\S*kind::{kind}" for product, kind in (("bf16", "f16"), ("fp16", "f16"), ("fp8", "f8f6f4"))
}
_MFMA = {
    "bf16": r"v_mfma_f32_\d+x\d+x\d+_bf16\w*",
    "fp16": r"v_mfma_f32_\d+x\d+x\d+_f16",
    "int8": r"v_mfma_i32_\d+x\d+x\d+_i8",
    "fp8": r"v_mfma_f32_\d+x\d+x\d+_f16",
}
ARCHITECTURES = (
    _nvidia(80, 108, 163, {}, _NO_FP8),
    _nvidia(86, 84, 99, {}, _NO_FP8),
    _nvidia(89, 128, 99, {}, {}),
    _nvidia(90, 132, 227, _WGMMA, {}),
    _nvidia(100, 148, 227, _TCGEN05, {"int8": "multiplies int8 by mma.sync: Triton has no tcgen05.mma for it"}),
    _nvidia(120, 170, 99, {}, {}),
    Architecture(
        "gfx942",
        GPUTarget("hip", "gfx942", 64),
        Gpu("gfx942", (9, 4), 304, 64 << 10),
        _MFMA,
        gaps={"fp8": "widens float8 to float16 and multiplies that: its matrix units take another kind of float8"},
    ),
)


@dataclass(frozen=True)
class Compiled:
    """What came out for one kernel on one architecture."""

    kernel: Shipped
    architecture: Architecture
    integers: str  # one of `INTEGERS`
    registers: int = 0
    shared_bytes: int = 0
    instructions: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

    def __str__(self) -> str:
        integers = f" with integers that are {self.integers}" if self.integers != "any" else ""
        return f"{self.kernel.name}, {self.architecture.name}{integers}: {'; '.join(self.faults) or 'no fault'}"


def kernels(gpu: Gpu) -> list[Shipped]:
    """Everything that the modules list for this GPU."""
    return [kernel for module in MODULES for kernel in module.shipped(gpu)]


def one_of_each(chosen: Iterable[Shipped]) -> list[Shipped]:
    """The first configuration of each kernel, type of product and kind of tile."""
    found: dict[tuple[object, ...], Shipped] = {}
    for kernel in chosen:
        found.setdefault((kernel.kernel.__name__, kernel.product, kernel.product_rows >= WIDE), kernel)
    return list(found.values())


def check(
    architecture: Architecture, chosen: Iterable[Shipped], integers: tuple[str, ...] = INTEGERS
) -> list[Compiled]:
    """Compile those kernels whose types exist on the architecture, on all cores."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so kernels cannot be compiled in this process: run this file")
    jobs = [
        (kernel, kind)
        for kernel in chosen
        if architecture.takes(kernel)
        for kind in (integers if _integers(kernel) else INTEGERS[:1])
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # the compiler runs without Python's lock
        return list(pool.map(lambda job: _checked(architecture, *job), jobs))


def _integers(kernel: Shipped) -> list[str]:
    return [name for name, kind in kernel.types.items() if kind in ("i32", "i64")]


def _checked(architecture: Architecture, kernel: Shipped, integers: str) -> Compiled:
    try:
        compiled = _compile(architecture, kernel, integers)
    except Exception as error:  # whatever the compiler throws is what this is to find
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return Compiled(kernel, architecture, integers, faults=(f"does not compile: {last}",))
    if architecture.target.backend == "cuda":
        registers, spilled = _resources(compiled.asm["cubin"])
        assembly = compiled.asm["ptx"]
    else:
        assembly = compiled.asm["amdgcn"]
        registers = _number(assembly, r"\.vgpr_count: +(\d+)")
        spilled = _number(assembly, r"\.private_segment_fixed_size: +(\d+)")
    shared, columns, faults = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0, []
    if spilled:
        faults.append(f"{spilled} bytes spilled")
    if shared > architecture.gpu.shared_bytes:
        faults.append(f"shared memory {shared:,} above {architecture.gpu.shared_bytes:,}")
    if columns > TENSOR_COLUMNS:
        faults.append(f"{columns} columns of tensor memory above {TENSOR_COLUMNS}")
    expected, instructions = architecture.expected(kernel), sorted(set(_PRODUCT.findall(assembly)))
    if expected is not None:
        if not instructions:
            faults.append(f"no {expected}")
        faults += [f"{found} instead of {expected}" for found in instructions if not re.fullmatch(expected, found)]
    return Compiled(kernel, architecture, integers, registers, shared, tuple(instructions), tuple(faults))


def _compile(architecture: Architecture, kernel: Shipped, integers: str) -> CompiledKernel:
    names, numbers = kernel.kernel.arg_names, _integers(kernel)
    constants = kernel.constants | (dict.fromkeys(numbers, 1) if integers == "1" else {})
    signature = {name: "constexpr" if name in constants else kernel.types[name] for name in names}
    aligned = [name for name, kind in kernel.types.items() if kind[0] == "*"]
    if integers == "multiples of 16":
        aligned += numbers
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel.kernel, signature, constants, attributes)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    return triton.compile(source, target=architecture.target, options=options)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory, where spills go) of a program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(get_ptxas(90).path).with_name("cuobjdump")
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return _number(said, r"REG:(\d+)"), _number(said, r"STACK:(\d+)") + _number(said, r"LOCAL:(\d+)")


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"there is no {pattern} in what the compiler said")
    return int(found[1])


def table(chosen: list[Shipped], rows: list[Compiled]) -> str:
    """Markdown: what came out, the gaps, the instructions of products, and a line for each of the kernels chosen."""
    here = conditions()
    architectures = list({row.architecture.name: row.architecture for row in rows}.values())
    return "\n".join(
        [
            "# Kernels compiled ahead of time",
            "",
            f"{count(rows)}. Triton {triton.__version__}; {here['commit']}; {here['date']}. Nothing here ran.",
            "",
            *_fault_lines(rows),
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
            "## Kernels",
            "",
            "Registers of a thread and KiB of shared memory of a program, the most for whole numbers of any kind; bold",
            "where there is a fault, - where the architecture lacks a type.",
            "",
            *_kernel_lines(chosen, architectures, rows),
            "",
        ]
    )


def _fault_lines(rows: list[Compiled]) -> list[str]:
    wrong = [f"- {row}" for row in rows if row.faults]
    return ["## Faults", "", *wrong, ""] if wrong else []


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


def count(rows: list[Compiled]) -> str:
    """How much was compiled, and with how many faults, in words."""
    wrong = sum(bool(row.faults) for row in rows)
    kernels, architectures = {row.kernel.name for row in rows}, {row.architecture.name for row in rows}
    return (
        f"{len(kernels)} kernels for {len(architectures)} architectures: "
        f"{len(rows):,} programs compiled, {wrong} with faults"
    )


def main() -> None:
    """Compile, print, and fail where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [architecture.name for architecture in ARCHITECTURES]
    parser.add_argument("--architectures", default=",".join(names))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--any-integers", action="store_true", help="none that are known to be multiples of 16, or 1")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    asked = args.architectures.split(",")
    if unknown := set(asked) - set(names):
        parser.error(f"--architectures has {', '.join(sorted(unknown))}; known are {', '.join(names)}")
    if args.write and (args.quick or args.any_integers or set(asked) != set(names)):
        parser.error("--write puts down the whole table: it goes with neither --quick nor some --architectures")
    if triton.knobs.runtime.interpret:  # it is too late to change that in here
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": "0"})
    chosen: dict[str, Shipped] = {}
    rows: list[Compiled] = []
    for architecture in ARCHITECTURES:
        if architecture.name in asked:
            began = time.monotonic()
            shipped = one_of_each(kernels(architecture.gpu)) if args.quick else kernels(architecture.gpu)
            chosen = {kernel.name: kernel for kernel in shipped} | chosen
            rows += (found := check(architecture, shipped, INTEGERS[:1] if args.any_integers else INTEGERS))
            seconds = time.monotonic() - began
            print(f"{architecture.name}: {len(found)} programs, {seconds:.0f} s", file=sys.stderr, flush=True)
    if args.write:
        RESULTS.write_text(table([*chosen.values()], rows))
    for row in rows:
        if row.faults:
            print(row)
    print(count(rows))
    sys.exit(any(row.faults for row in rows))


if __name__ == "__main__":
    main()
