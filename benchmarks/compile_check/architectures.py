"""`Architecture`: what a kernel may use there, how matrix products look in its assembly, and how many programs fit."""

from dataclasses import dataclass, field

from triton.backends.compiler import GPUTarget

from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.shipped_triton import Shipped

WIDE = 64
"""The rows from which on a product is one of a whole group of warps, where the architecture has such products."""


@dataclass(frozen=True)
class Multiprocessor:
    """What an NVIDIA multiprocessor holds at once, beside its 65,536 registers.

    From the table of technical specifications in the CUDA programming guide's chapter on compute capabilities. The
    units in which registers and shared memory are given out are those of CUDA's occupancy calculator.
    """

    programs: int
    threads: int
    shared_bytes: int

    def resident(self, warps: int, registers: int, shared_bytes: int) -> int:
        """Return the number of programs that fit, for registers of a thread and shared memory of a program.

        A multiprocessor has four parts of 16,384 registers. A warp lies in one part, and takes registers in units of
        256. A program takes shared memory in units of 128 bytes, and 1 KiB more that the system keeps.
        """
        of_a_warp = -(-registers * 32 // 256) * 256
        of_a_program = -(-shared_bytes // 128) * 128 + 1024
        return min(
            self.programs,
            self.threads // (32 * warps),
            4 * (16_384 // of_a_warp) // warps,
            self.shared_bytes // of_a_program,
        )


@dataclass(frozen=True)
class Architecture:
    """What a kernel may use there, and how matrix products look in its assembly."""

    name: str
    target: GPUTarget
    gpu: Gpu
    instructions: dict[str, str]  # by type of product; without "fp8" the type does not exist there
    multiprocessor: Multiprocessor | None = None  # None where its loops are not read
    wide: dict[str, str] = field(default_factory=dict)  # the same for products of `WIDE` rows, where they differ
    exact: str | None = None  # a pattern of matrix instructions that multiply float32 unrounded
    gaps: dict[str, str] = field(default_factory=dict)  # by type of product: what is not as one would wish

    @property
    def copies_ahead(self) -> bool:
        """Whether loads into shared memory go on while the program computes."""
        return self.target.backend == "cuda"

    def takes(self, kernel: Shipped) -> bool:
        """False if it lacks a type of the kernel's."""
        return "fp8" in self.instructions or not needs_fp8(kernel)

    def expected(self, kernel: Shipped) -> str | None:
        """A pattern of the matrix instructions that the kernel may have, and must have if it has such a product."""
        if kernel.product is None:
            return self.exact
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
    capability: int,
    processors: int,
    shared_kilobytes: int,
    programs: int,
    threads: int,
    wide: dict[str, str],
    gaps: dict[str, str],
) -> Architecture:
    types = {"bf16": "bf16", "fp16": "f16", "int8": "s8", "fp8": "e4m3"}
    if capability < 89:
        del types["fp8"]
    products = {product: rf"mma\.sync\S*\.{kind}\.{kind}\.\w+" for product, kind in types.items()}
    name, target = f"sm_{capability}", GPUTarget("cuda", capability, 32)
    gpu = Gpu(name, divmod(capability, 10), processors, shared_kilobytes << 10)
    # One program may take all shared memory but the 1 KiB that the system keeps.
    multiprocessor = Multiprocessor(programs, threads, (shared_kilobytes + 1) << 10)
    return Architecture(name, target, gpu, products, multiprocessor, wide, gaps=gaps)


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
    _nvidia(80, 108, 163, 32, 2048, {}, _NO_FP8),
    _nvidia(86, 84, 99, 16, 1536, {}, _NO_FP8),
    _nvidia(89, 128, 99, 24, 1536, {}, {}),
    _nvidia(90, 132, 227, 32, 2048, _WGMMA, {}),
    _nvidia(
        100, 148, 227, 32, 2048, _TCGEN05, {"int8": "multiplies int8 by mma.sync: Triton has no tcgen05.mma for it"}
    ),
    _nvidia(120, 170, 99, 24, 1536, {}, {}),
    Architecture(
        "gfx942",
        GPUTarget("hip", "gfx942", 64),
        Gpu("gfx942", (9, 4), 304, 64 << 10),
        _MFMA,
        exact=r"v_mfma_f32_\d+x\d+x\d+_f32",
        gaps={"fp8": "widens float8 to float16 and multiplies that: its matrix units take another kind of float8"},
    ),
)
