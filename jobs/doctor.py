"""What a machine offers to jobs, and what to do about what is missing."""

import os
from collections.abc import Iterator
from pathlib import Path

from batchinfer.cost.step_cost import DeviceCost
from batchinfer.errors import Refused
from batchinfer.host import allocator
from batchinfer.host.device import device_of, has_gpu
from batchinfer.host.own_process import own_process
from batchinfer.jobs.log import printable, say
from batchinfer.jobs.plan.device_file import DeviceKey, read_device_cost, write_device_cost
from batchinfer.jobs.report import versions

Line = tuple[str, str]

LARGEST_ERROR = 0.15  # of steps as they were fitted; on a machine at rest it is far below


def examine(device: str, calibrate: bool) -> str:
    """Aligned lines about "cpu" or "cuda", or what `auto` takes; the device is measured first if asked.

    Raises `Refused` for a device that is not there.
    """
    found = device_of(device)
    key = DeviceKey.of(found)
    kernels = list(_kernels(found))
    if calibrate:
        from batchinfer.cost.calibrate import measure

        own_process()
        allocator.keep_freed_memory()
        say(f"measuring {key.device}; figures are too low where other programs run meanwhile")
        try:
            write_device_cost(key, measure(found, say))
        except ValueError as error:
            raise Refused(f"{key.device} cannot be measured: {error}") from error
    cost, missing = read_device_cost(key)
    lines = [
        ("device", f"{key.device}, {key.cores} cores" if found == "cpu" else key.device),
        ("memory", _memory()),
        *[(name, number) for name, number in versions().items()],
        *kernels,
        *([] if cost is None else _ceilings(cost, key.path)),
        *([] if missing is None else [("missing", missing)]),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(printable(f"{name:<{width}}  {value}") for name, value in lines)


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB free"


def _kernels(device: str) -> Iterator[Line]:
    """Which products are fast here, as torch finds out."""
    import torch

    from batchinfer.kernels.backends import choose_backend
    from batchinfer.kernels.linear_w4a16 import vectorized

    try:
        backend = choose_backend(device, deterministic=False)
    except ValueError as error:
        raise Refused(str(error)) from error
    yield "backend", type(backend).__name__
    yield "8-bit products", ", ".join(sorted(backend.eight_bits)) or "none"
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        yield "GPU memory", f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
        return
    yield "processor's code", torch.backends.cpu.get_cpu_capability()
    if "x86" not in torch.backends.quantized.supported_engines:
        yield "missing", "oneDNN's product of 8-bit numbers: w8a8-int8 takes the plain reference, which is slow"
    if not vectorized():
        yield "missing", "AVX2: weights in 4 bits are expanded"
    if has_gpu(torch.__version__):
        yield "GPU", "there is one; jobs take it unless they are told --device cpu"


def _ceilings(cost: DeviceCost, path: Path) -> Iterator[Line]:
    for products, operations in cost.operations_per_second.items():
        error = cost.steps[products].error
        doubt = "; measure again while nothing else runs" if error > LARGEST_ERROR else ""
        yield f"{products} products", f"{operations / 1e9:,.0f} GOP/s; steps fitted to {100 * error:.0f} %{doubt}"
    yield "memory copies", f"{cost.bytes_per_second / 1e9:,.1f} GB/s"
    yield "last cache", f"{cost.cache_bytes / 1e6:,.0f} MB of weights stay there"
    yield "measured", str(path)
