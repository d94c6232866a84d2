"""Compiling shipped kernels for an architecture, and finding what is not as it should be in what came out."""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from compile_check.architectures import WIDE, Architecture
from compile_check.loops import Turn, buffers, copies_in_flight, turn_of
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, CompiledKernel

from batchinfer.kernels import (
    activation_triton,
    attention_merge_triton,
    attention_triton,
    experts_triton,
    kv_cache_triton,
    linear_triton,
    linear_w4a16_triton,
    linear_w8a8_triton,
    logits_triton,
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
    logits_triton,
    sampling_triton,
    attention_triton,
    attention_merge_triton,
    linear_triton,
    linear_w8a8_triton,
    linear_w4a16_triton,
    experts_triton,
)
INTEGERS = ("any", "multiples of 16", "1")
"""What whole numbers among the arguments are. A launch takes a program of its own for each, unless the kernel says
`do_not_specialize`, so all three are compiled; that real arguments are a mix of them changes little."""
TENSOR_COLUMNS = 512
"""The columns of tensor memory, which holds the sums of tcgen05.mma."""
_PRODUCT = re.compile(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)[\w.:]*")


@dataclass(frozen=True)
class Compiled:
    """What came out for one kernel on one architecture."""

    kernel: Shipped
    architecture: Architecture
    integers: str  # one of `INTEGERS`
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    instructions: tuple[str, ...] = ()  # of matrix units
    buffers: int | None = None  # of each operand; None where no loop copies operands into shared memory
    in_flight: int | None = None  # fewest groups of copies that a loop's wait leaves in flight
    turn: Turn | None = None  # None also where machine code was not read
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
    architecture: Architecture,
    chosen: Iterable[Shipped],
    integers: tuple[str, ...] = INTEGERS,
    read: frozenset[str] = frozenset(),
) -> list[Compiled]:
    """Compile those kernels whose types exist on the architecture, on all cores.

    `read` names those whose machine code is read although nothing in it is checked; reading takes a second.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so kernels cannot be compiled in this process: run this file")
    jobs = [
        (kernel, kind, kernel.name in read)
        for kernel in chosen
        if architecture.takes(kernel)
        for kind in (integers if specialized(kernel) else INTEGERS[:1])
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # the compiler runs without Python's lock
        return list(pool.map(lambda job: _checked(architecture, *job), jobs))


def specialized(kernel: Shipped) -> list[str]:
    """Return the names of the arguments that are whole numbers for which a launch takes programs of their own."""
    fixed = {param.name for param in kernel.kernel.params if param.do_not_specialize}
    return [name for name, kind in kernel.types.items() if kind in ("i32", "i64") and name not in fixed]


def _checked(architecture: Architecture, kernel: Shipped, integers: str, read: bool) -> Compiled:
    try:
        compiled = _compile(architecture, kernel, integers)
    except Exception as error:  # whatever the compiler throws is what this is to find
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return Compiled(kernel, architecture, integers, faults=(f"does not compile: {last}",))
    turn, ttgir = None, compiled.asm["ttgir"]
    if architecture.target.backend == "cuda":
        said = _cuobjdump(compiled.asm["cubin"], "-res-usage")
        registers = _number(said, r"REG:(\d+)")
        spilled = _number(said, r"STACK:(\d+)") + _number(said, r"LOCAL:(\d+)")
        assembly = compiled.asm["ptx"]
        if read or kernel.most_instructions is not None:
            turn = turn_of(_cuobjdump(compiled.asm["cubin"], "-sass"))
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
    instructions = tuple(sorted(set(_PRODUCT.findall(assembly))))
    faults += _wrong_products(architecture, kernel, instructions)
    in_flight = min(copies_in_flight(ttgir), default=None)
    if kernel.prefetches and architecture.copies_ahead and not in_flight:
        faults.append("loads nothing ahead: " + ("no asynchronous copy" if in_flight is None else "async_wait of 0"))
    if kernel.most_instructions is not None and architecture.target.backend == "cuda":
        if turn is None and integers != "1":  # which may be the number of turns
            faults.append("no loop whose instructions could be counted")
        elif turn is not None and turn.instructions > kernel.most_instructions:
            faults.append(f"{turn.instructions} instructions a turn above {kernel.most_instructions}")
    return Compiled(
        kernel, architecture, integers, registers, spilled, shared, instructions, buffers(ttgir), in_flight, turn,
        tuple(faults),
    )  # fmt: skip


def _wrong_products(architecture: Architecture, kernel: Shipped, instructions: tuple[str, ...]) -> list[str]:
    expected = architecture.expected(kernel)
    if expected is None:
        return [f"{found}, where matrix units would round" for found in instructions]
    if kernel.product is not None and not instructions:
        return [f"no {expected}"]
    return [f"{found} instead of {expected}" for found in instructions if not re.fullmatch(expected, found)]


def _compile(architecture: Architecture, kernel: Shipped, integers: str) -> CompiledKernel:
    names, numbers = kernel.kernel.arg_names, specialized(kernel)
    constants = kernel.constants | (dict.fromkeys(numbers, 1) if integers == "1" else {})
    signature = {name: "constexpr" if name in constants else kernel.types[name] for name in names}
    aligned = [name for name, kind in kernel.types.items() if kind[0] == "*"]
    if integers == "multiples of 16":
        aligned += numbers
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel.kernel, signature, constants, attributes)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    return triton.compile(source, target=architecture.target, options=options)


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(get_ptxas(90).path).with_name("cuobjdump")
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"there is no {pattern} in what the compiler said")
    return int(found[1])
