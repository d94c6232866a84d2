"""Describing the GPU that this process has, with the limits that Triton knows of it."""

import torch
from triton.runtime import driver

from batchinfer.kernels.gpu import INTERPRETED, Gpu, refuse_old


def gpu_of(device: torch.device) -> Gpu:
    """Describe the GPU `device`; on the CPU, `INTERPRETED`. Raises `ValueError` if the GPU is too old."""
    if device.type != "cuda":
        return INTERPRETED
    found = torch.cuda.get_device_properties(device)
    refuse_old(found.name, (found.major, found.minor))
    limits = driver.active.utils.get_device_properties(device.index or 0)
    return Gpu(found.name, (found.major, found.minor), found.multi_processor_count, limits["max_shared_mem"])
