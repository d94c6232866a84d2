"""Choosing the backend: the device's own, or Triton's interpreter on the CPU if `BATCHINFER_KERNELS` asks for it."""

import os

import torch

from batchinfer.kernels import dispatch
from batchinfer.kernels.backend import Backend
from batchinfer.kernels.backend_compiled import CompiledBackend
from batchinfer.kernels.backend_cpu import CpuBackend
from batchinfer.kernels.cpu_library import REFERENCE, cpu_path


def choose_backend(device: str, deterministic: bool, path: str = "auto") -> Backend:
    """Return the backend for `device`, "cpu" or "cuda"; on the CPU with the kernels of this `path`.

    `deterministic` means that a row's bits do not depend on the batch. On the CPU they never do. Raises `ValueError`
    if the device is unknown or missing, or the path is.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; it must be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is 'cuda', but torch {torch.__version__} finds no such device here; take --device cpu, or install "
            "a torch that was built for the device and its driver"
        )
    if device == "cuda" or dispatch.wanted() == "triton":
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("BATCHINFER_KERNELS=triton runs on the CPU only with TRITON_INTERPRET=1, for tests")
        from batchinfer.kernels.backend_triton import TritonBackend

        return TritonBackend(torch.device(device), deterministic)
    chosen = cpu_path(path)
    return CpuBackend() if chosen == REFERENCE else CompiledBackend(chosen)
