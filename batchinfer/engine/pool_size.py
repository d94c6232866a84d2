"""Compute how many blocks the KV cache gets."""

from dataclasses import dataclass, replace

import torch

from batchinfer.engine.config import EngineConfig
from batchinfer.host.memory import available_bytes
from batchinfer.kernels.kv_cache import MOST
from batchinfer.models.config import ModelConfig

CPU_SHARE = 0.9  # share of the system's available memory that the KV cache may take
RECORDINGS_SHARE = 1 / 8  # most of what weights and a step leave of a device that recorded steps may take


@dataclass(frozen=True)
class Room:
    """The bytes that keys and values may take, and a text that says how the number came about."""

    nbytes: int
    reason: str
    recordings: int = 0  # bytes kept free for recorded steps

    @classmethod
    def on_cpu(cls) -> "Room":
        """Return CPU_SHARE of the system's available memory."""
        available = available_bytes()
        return cls(int(available * CPU_SHARE), f"{CPU_SHARE:.0%} of {_gb(available)} available")

    @classmethod
    def on_device(cls, total: int, free: int, activations: int, recordings: int, utilization: float) -> "Room":
        """Return what is left of a device's `total` bytes, of which `free` are free with the weights loaded.

        A step takes `activations` bytes. Recorded steps get the `recordings` bytes that they want, or
        RECORDINGS_SHARE of what is left. `utilization` is the share of `total` that may be used; the rest is for the
        driver.
        """
        used, usable = total - free, int(total * utilization)
        left = max(0, usable - used - activations)
        recordings = min(recordings, int(left * RECORDINGS_SHARE))
        reason = (
            f"{_gb(usable)} by --gpu-memory-utilization {utilization:g} of {_gb(total)}, less {_gb(used)} in use "
            f"(weights, and other processes), less {_gb(activations)} for a step and {_gb(recordings)} for recorded "
            "ones"
        )
        return cls(left - recordings, reason, recordings)

    def limited(self, most: int | None) -> "Room":
        """Return this room, cut to `most` bytes if the user has set a limit."""
        return (
            self
            if most is None or most >= self.nbytes
            else replace(self, nbytes=most, reason=f"--kv-cache-memory-bytes {most}")
        )


def pool_blocks(config: EngineConfig, a_token: int, kv_dtype: torch.dtype, room: Room) -> tuple[int, str | None]:
    """Return (number of blocks, note for the report or None).

    The blocks hold the tokens that `config` asks for, at least one sequence of the greatest length. If memory holds
    fewer, the blocks are as many as fit and the note says so. A token takes `a_token` bytes in all models together.
    Raises `ValueError` if not even one sequence fits.
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
    """Return the bytes of a token's keys and values in all layers."""
    scale = 4 if kv_dtype in MOST else 0
    return sum(2 * a.kv_heads * (a.head_dim * kv_dtype.itemsize + scale) for a in model.attentions)


def is_out_of_memory(error: Exception) -> bool:
    """True if the error means that memory ran out. For host memory, torch says so only in the error's text."""
    said = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
