"""Every shipped kernel in every configuration, compiled and loaded on the device: a process does its share of them."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from compile_check.programs import kernels
from gpu_check.session import Session
from triton.runtime.jit import MockTensor

from batchinfer.kernels.shipped_triton import Shipped

TITLE = "Kernels as they were compiled and loaded here"
INTEGERS = {"any": 17, "multiples of 16": 16}
"""What whole numbers among the arguments may be; a launch takes a program of its own for each."""
TYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "i8": torch.int8,
    "i32": torch.int32,
    "i64": torch.int64,
    "i1": torch.bool,
    "u8": torch.uint8,
    "fp8e4nv": torch.float8_e4m3fn,
}


def run(session: Session) -> None:
    """A row for each program: registers, words spilled, shared memory. A spill is a fault."""
    for kernel, integers in session.within_time(session.own(_programs(session))):
        with session.case(f"{kernel.name}, integers {integers}"):
            _compile(session, kernel, integers)


def _programs(session: Session) -> Iterator[tuple[Shipped, str]]:
    for kernel in kernels(session.gpu):
        if "fp8" in str(kernel.types) and not session.gpu.has_float8:
            continue
        numbers = any(kind in ("i32", "i64") for kind in kernel.types.values())
        for integers in INTEGERS if numbers else ("any",):
            yield kernel, integers


def _compile(session: Session, kernel: Shipped, integers: str) -> None:
    arguments = arguments_of(kernel, INTEGERS[integers])
    if session.smoke:
        session.row(TITLE, kernel=kernel.name, integers=integers, device="not compiled: no device")
        return
    began = time.perf_counter()
    program = kernel.kernel.warmup(
        **arguments, **kernel.constants, num_warps=kernel.warps, num_stages=kernel.stages, grid=(1,)
    )
    program.run  # noqa: B018  loads it, which fails where it takes more than the device has
    session.row(
        TITLE,
        kernel=kernel.name,
        integers=integers,
        registers=program.n_regs,
        **{"spilled words": program.n_spills, "shared, bytes": program.metadata.shared},
        **{"compiled in, s": time.perf_counter() - began},
    )
    assert not program.n_spills, f"{program.n_spills} words spilled"


def arguments_of(kernel: Shipped, integer: int) -> dict[str, Any]:
    """What stands for the arguments of a launch: tensors of the right types, and numbers."""
    found: dict[str, Any] = {}
    for name, kind in kernel.types.items():
        if name in kernel.constants:
            continue
        if kind.startswith("*"):
            found[name] = MockTensor(TYPES[kind[1:]])
        else:
            found[name] = 1.0 if kind.startswith("fp") else integer
    return found
