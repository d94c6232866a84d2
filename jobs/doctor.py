"""Describing what this machine offers to jobs, what is missing, and how to get it."""

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from batchinfer.cost.step_cost import DeviceCost
from batchinfer.errors import Refused
from batchinfer.host import allocator
from batchinfer.host.device import device_of, has_gpu
from batchinfer.host.own_process import own_process
from batchinfer.jobs.amounts import count_of
from batchinfer.jobs.log import printable, say
from batchinfer.jobs.plan.device_file import DeviceKey, read_device_cost, write_device_cost
from batchinfer.jobs.report import versions

Line = tuple[str, str]

PATH = re.compile(r"(?<![\w.])~?(/[^\s,;:'\"]+)+")
LARGEST_ERROR = 0.15  # largest error of the fitted step times to trust; an idle machine has far less


def examine(device: str, calibrate: bool, path: str = "auto") -> str:
    """Return aligned lines about the device "cpu" or "cuda", or the one that "auto" takes. With `calibrate`, the device
    is measured first, on a CPU with the kernels of this `path`.

    Raises `Refused` if there is no such device or path, or if it cannot be measured.
    """
    found = device_of(device)
    try:
        key = DeviceKey.of(found, path)
    except ValueError as error:
        raise Refused(str(error)) from error
    kernels = list(_kernels(found, path))
    if calibrate:
        from batchinfer.cost.calibrate import measure

        own_process()
        allocator.keep_freed_memory()
        say(f"measuring {key.device}; speeds come out too low if other programs run at the same time")
        try:
            write_device_cost(key, measure(found, say, path))
        except ValueError as error:
            raise Refused(f"{key.device} cannot be measured: {error}") from error
    cost, missing = read_device_cost(key)
    lines = [
        ("device", f"{key.device}, {count_of(key.cores, 'core')}" if found == "cpu" else key.device),
        ("memory", _memory()),
        *[(name, number) for name, number in versions().items()],
        *kernels,
        *([] if cost is None else _ceilings(cost, key.path)),
        *([] if missing is None else [("missing", missing)]),
    ]
    width = max(len(name) for name, _ in lines)
    shown = [printable(f"{name:<{width}}  {value}") for name, value in lines]
    return "\n".join([*shown, "", *_for_a_bug_report(lines)])


def _for_a_bug_report(lines: list[Line]) -> Iterator[str]:
    """Yield the lines as a block to paste, with the system and without paths; none of them names a machine."""
    yield "To paste into a bug report; it has no paths and names neither the machine nor a person:"
    yield "```"
    libc = " ".join(platform.libc_ver())
    system = f"{platform.system()} {platform.release()}, {platform.machine()}, {libc}"
    for name, value in [("system", system), *lines]:
        yield printable(f"{name}: {PATH.sub('(path)', value)}")
    yield "```"


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB free"


def _kernels(device: str, path: str) -> Iterator[Line]:
    """Yield lines about the fast products of this machine, as torch reports them."""
    import torch

    from batchinfer.kernels.backend_compiled import CompiledBackend
    from batchinfer.kernels.backends import choose_backend
    from batchinfer.kernels.cpu_library import REFERENCE, cpu_path, why_reference
    from batchinfer.kernels.linear_w4a16 import vectorized
    from batchinfer.kernels.processor import multiplied_in

    try:
        backend = choose_backend(device, False, path)
    except ValueError as error:
        raise Refused(str(error)) from error
    yield "backend", type(backend).__name__
    yield "8-bit products", ", ".join(sorted(backend.eight_bits)) or "none"
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        yield "GPU memory", f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
        return
    yield "CPU instructions", torch.backends.cpu.get_cpu_capability()
    yield "CPU path", backend.path if isinstance(backend, CompiledBackend) else REFERENCE
    if cpu_path() == REFERENCE:
        yield "missing", why_reference()
    if not isinstance(backend, CompiledBackend):
        yield from _eight_bit_products()
    for dtype in (torch.bfloat16, torch.float16):
        if multiplied_in(dtype) != dtype:
            name = str(dtype).removeprefix("torch.")
            yield "missing", f"instructions for {name}: its products are computed in float32, weights stay in {name}"
    if not vectorized():
        yield "missing", "AVX2: weights in 4 bits are expanded to floating point before they are used"
    if has_gpu(torch.__version__):
        yield "GPU", "present; jobs use it unless --device cpu is given"


def _eight_bit_products() -> Iterator[Line]:
    """Yield a line about what torch's product of 8-bit integers lacks here."""
    import torch

    from batchinfer.kernels.linear_w8a8 import saturates

    if "x86" not in torch.backends.quantized.supported_engines:
        yield "missing", "oneDNN's product of 8-bit integers: w8a8-int8 runs with slow reference code"
    elif saturates():
        yield "missing", "VNNI instructions: products of 8-bit integers take twice the operations"


def _ceilings(cost: DeviceCost, path: Path) -> Iterator[Line]:
    for products, operations in cost.operations_per_second.items():
        error = cost.steps[products].error
        doubt = "; this is much: measure again while nothing else runs" if error > LARGEST_ERROR else ""
        yield (
            f"{products} products",
            f"{operations / 1e9:,.0f} GOP/s; error of fitted steps {100 * error:.0f} %{doubt}",
        )
    yield "memory copies", f"{cost.bytes_per_second / 1e9:,.1f} GB/s"
    yield "last cache", f"{cost.cache_bytes / 1e6:,.0f} MB of weights stay in it between steps"
    yield "measured", str(path)
