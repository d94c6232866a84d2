"""`FourBitPath`: how weights that a checkpoint stores in 4 bits are multiplied, chosen once for a job."""

from dataclasses import dataclass

import torch

from batchinfer.engine.config import FEW_ROWS, EngineConfig
from batchinfer.formats.scheme import QuantScheme
from batchinfer.kernels.backend import Backend
from batchinfer.kernels.backend_cpu import CpuBackend
from batchinfer.kernels.linear_w4a16 import vectorized


@dataclass(frozen=True)
class FourBitPath:
    """Whether weights stay packed in 4 bits or are expanded, and why, for the report."""

    packed: bool
    reason: str

    @classmethod
    def choose(cls, config: EngineConfig, scheme: QuantScheme, dtype: torch.dtype, backend: Backend) -> "FourBitPath":
        """Choose the path; by the expected batch if the scheme, processor and `dtype` leave both open.

        On both paths activations stay in floating point.
        """
        if scheme.name != "auto":
            return cls(False, f"--quantization {scheme.name}")
        if scheme.quantized:
            return cls(False, "other matrices of the checkpoint ask for 8-bit products")
        if not isinstance(backend, CpuBackend):
            return cls(True, "for the GPU's kernel")
        if dtype != torch.bfloat16:
            return cls(False, "int4pack computes in bfloat16 alone")
        if not vectorized():
            return cls(False, "int4pack has no vector code for this processor")
        sign = "<=" if config.few_rows else ">"
        reason = f"expected batch {config.usual_batch} {sign} {FEW_ROWS}"
        return cls(config.few_rows, f"for int4pack: {reason}" if config.few_rows else reason)
