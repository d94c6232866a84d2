"""Which backend computes: the device's own, or by `BATCHINFER_KERNELS` Triton's interpreter on the CPU."""

import os

import torch

from batchinfer.kernels import dispatch
from batchinfer.kernels.backend import Backend
from batchinfer.kernels.backend_cpu import CpuBackend


def choose_backend(device: str, deterministic: bool) -> Backend:
    """For "cpu" or "cuda". On the CPU a row's bits never depend on the batch, `deterministic` or not.

    A `ValueError` says what the device lacks.
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
    return CpuBackend()
