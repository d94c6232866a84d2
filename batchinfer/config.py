"""What the engine is told before it loads: resolved once by the job, frozen, picklable, free of torch."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class EngineConfig:
    """One engine on one device.

    `kv_cache_tokens` is how many tokens' keys and values the pool must hold, as the plan counted them: the engine
    rounds up to blocks. `random_weights` fills the shape in `model/config.json` with noise, for benchmarks.
    """

    model: Path  # a local directory
    device: str = "cpu"
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    quantization: str = "auto"  # auto | none | w8a8-int8 | w8a8-int8+head
    kv_cache_dtype: str = "auto"  # auto | float32 | bfloat16 | int8
    max_model_len: int = 2048
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 32
    kv_cache_tokens: int = 65536
    random_weights: bool = False


@dataclass
class EngineStats:
    """What the engine counted so far; seconds of mixed steps are shared out by tokens."""

    steps: int = 0
    prompt_tokens: int = 0  # prompt tokens computed
    completion_tokens: int = 0
    preemptions: int = 0
    padded_tokens: int = 0  # rows computed beside real tokens
    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    operations: int = 0  # integer and floating-point operations of the matrix products asked for
    peak_operations_per_second: float = 0.0  # measured on this device with the scheme's own product
    weight_bytes: int = 0
    kv_cache_bytes: int = 0
    peak_memory_bytes: int = 0  # of the engine's process
    step_sizes: dict[int, int] = field(default_factory=dict)  # tokens of a step, padded -> steps
    kernels: dict[str, str] = field(default_factory=dict)  # op -> path taken
    device: str = ""
    notes: list[str] = field(default_factory=list)  # slower paths taken, for the report
