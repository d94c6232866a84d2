"""Compute how many blocks the KV cache gets."""

from dataclasses import dataclass, replace

import torch

from batchinfer.engine.config import CPU_SHARE, EngineConfig
from batchinfer.host.memory import available_bytes
from batchinfer.kernels.kv_cache import MOST
from batchinfer.models.config import ModelConfig

STATES_SHARE = 1 / 2  # most of the room that the states of rows which run side by side may take
SPARE_SHARE = 1 / 8  # most of the room that states for snapshots and drafts may take beside them
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

    def without(self, nbytes: int, what: str) -> "Room":
        """Return the room beside `what`, which takes `nbytes` of it."""
        return replace(
            self, nbytes=max(0, self.nbytes - nbytes), reason=f"{self.reason}, less {_gb(nbytes)} for {what}"
        )

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


def pool_states(config: EngineConfig, a_state: int, room: Room) -> tuple[int, str | None]:
    """Return (number of states, state 0 included; note for the report or None). A state takes `a_state` bytes.

    Each row that usually runs has one. There are more for snapshots, and for drafts if there may be any.
    """
    asked = config.usual_batch
    rows = max(1, min(asked, int(room.nbytes * STATES_SHARE) // a_state))
    drafts = 0 if config.speculation.method == "off" else config.speculation.num_speculative_tokens + 1
    spare = max(1, min(rows * (1 + drafts), int(room.nbytes * SPARE_SHARE) // a_state))
    note = None
    if rows < asked:
        note = (
            f"memory holds the states of {rows} rows where {asked} are to run side by side: "
            f"{a_state / 1e6:.1f} MB each, in half of what there is ({room.reason})"
        )
    return 1 + rows + spare, note


def bytes_per_token(model: ModelConfig, kv_dtype: torch.dtype) -> int:
    """Return the bytes of a token's keys and values in all layers."""
    return sum(a.kv_bytes(kv_dtype.itemsize) for a in model.storing)


def is_out_of_memory(error: Exception) -> bool:
    """True if the error means that memory ran out. For host memory, torch says so only in the error's text."""
    said = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
