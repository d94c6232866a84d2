"""How many blocks of keys and values fit, and what a process has used."""

from dataclasses import dataclass

import torch

from batchinfer.engine.config import EngineConfig
from batchinfer.host.memory import available_bytes
from batchinfer.kernels.kv_cache import MOST
from batchinfer.models.config import ModelConfig

CPU_SHARE = 0.9  # of the memory that the system has available


@dataclass(frozen=True)
class Room:
    """What is there for keys and values, and how that came about."""

    nbytes: int
    reason: str

    @classmethod
    def on_cpu(cls) -> "Room":
        """Nine tenths of what is available."""
        available = available_bytes()
        return cls(int(available * CPU_SHARE), f"{CPU_SHARE:.0%} of {_gb(available)} available")

    @classmethod
    def on_device(cls, total: int, free: int, activations: int, utilization: float) -> "Room":
        """Of a device with so many bytes, so many of them free beside the weights, of which a step takes `activations`.

        The share that utilization leaves is for graphs and for what the driver keeps.
        """
        used, usable = total - free, int(total * utilization)
        reason = (
            f"{_gb(usable)} by --gpu-memory-utilization {utilization:g} of {_gb(total)}, less {_gb(used)} in use "
            f"(weights, and other processes), less {_gb(activations)} for a step"
        )
        return cls(max(0, usable - used - activations), reason)

    def limited(self, most: int | None) -> "Room":
        """No more than the user allows."""
        return self if most is None or most >= self.nbytes else Room(most, f"--kv-cache-memory-bytes {most}")


def pool_blocks(config: EngineConfig, a_token: int, kv_dtype: torch.dtype, room: Room) -> tuple[int, str | None]:
    """(blocks for what the plan asks, or for one longest sequence; a note where they are fewer).

    A token takes `a_token` bytes in all models together.
    A `ValueError` says why not even one sequence fits.
    """
    asked = max(config.kv_cache_tokens, config.max_model_len)
    fits = room.nbytes // a_token
    if fits < config.max_model_len:
        remedies = "lower --max-model-len"
        if kv_dtype not in MOST:
            remedies += " or take --kv-cache-dtype int8"
        if config.device == "cuda":
            remedies += (
                "; a smaller --max-num-batched-tokens or --max-num-seqs leaves more, and so do weights in fewer bits "
                "(--quantization) and a larger --gpu-memory-utilization"
            )
        raise ValueError(
            f"max_model_len {config.max_model_len} needs {config.max_model_len * a_token / 1e6:.0f} MB of keys and "
            f"values ({a_token} bytes a token), but {room.nbytes / 1e6:.0f} MB are available: {room.reason}; {remedies}"
        )
    note = None
    if fits < asked:
        note = (
            f"memory holds keys and values of {fits} tokens where the plan asks for {asked}: fewer rows run side by "
            f"side ({room.reason})"
        )
    return min(asked, fits) // config.block_size + 2, note


def bytes_per_token(model: ModelConfig, kv_dtype: torch.dtype) -> int:
    """Of keys and values in all layers."""
    scale = 4 if kv_dtype in MOST else 0
    shapes = [layer.attention for layer in model.layers]
    return sum(2 * a.kv_heads * (a.head_dim * kv_dtype.itemsize + scale) for a in shapes)


def is_out_of_memory(error: Exception) -> bool:
    """On a device or on the host, of whose memory torch tells in words only."""
    said = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
