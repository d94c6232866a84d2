"""`EngineConfig`: the settings of an engine. Frozen and picklable. Free of torch: a job's parent process makes it."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from batchinfer.kernels.cpu_library import REFERENCE
from batchinfer.kernels.grain import TILE

FEW_ROWS = 4
"""With up to this many rows side by side, 4-bit weights are best left in 4 bits (benchmarks/four_bit.py).

At 8 rows the int4pack kernel still makes new tokens a third faster than weights expanded to bfloat16. But it computes
prompts at less than half the speed. From 8 rows on this loss exceeds the gain if a row has as many new tokens as prompt
tokens.
"""

LEAST_BATCHED_TOKENS = 64  # tokens of one tile of a prompt
BLOCK_SIZES = (16, 32, 64)
BLOCK_SIZE = 32
BLOCK_SIZE_IN_C = 16  # with which more of what prompts have in common is shared
LEAST_GPU_SHARE = 0.05  # least share of a GPU's memory
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}  # bytes of a number in the KV cache
CPU_SHARE = 0.9  # share of the system's available memory that keys and values may take on a CPU
KV_CACHE_DTYPES = ("auto", *KV_CACHE_BYTES)
METHODS = ("off", "auto", "ngram", "suffix", "draft_model")
MOST_DRAFTS = 32  # tokens


@dataclass(frozen=True)
class Speculation:
    """The settings of `--speculative-config`, under the names that other engines use.

    `ngram` copies drafts from the row itself, `suffix` also from answers of earlier rows of the job, and `draft_model`
    asks a smaller model. `auto` picks among these at each step what is expected to be fastest. The output is the same
    with every method. Raises `ValueError` naming field, value and bound.
    """

    method: str = "auto"
    num_speculative_tokens: int = 8  # most drafts of a row in one step
    model: Path | None = None  # the draft model, a local directory
    prompt_lookup_min: int = 2  # least tokens that must match earlier text before what followed there is drafted
    prompt_lookup_max: int = 5  # most tokens that are compared; longer matches are no better evidence
    gate: bool = True  # draft only as many tokens as are expected to pay; False: verify all drafts at every step

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; it must be one of {', '.join(METHODS)}")
        if not 1 <= self.num_speculative_tokens <= MOST_DRAFTS:
            raise ValueError(
                f"num_speculative_tokens is {self.num_speculative_tokens}; it must be from 1 to {MOST_DRAFTS}"
            )
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max <= MOST_DRAFTS:
            raise ValueError(
                f"prompt_lookup_min is {self.prompt_lookup_min} and prompt_lookup_max {self.prompt_lookup_max}; they "
                f"must be from 1 to {MOST_DRAFTS}, the first not above the second"
            )
        if self.method == "draft_model" and self.model is None:
            raise ValueError("method is 'draft_model' and there is no model; name one")

    @property
    def looks_up(self) -> bool:
        """True if drafts may be copied from known text."""
        return self.method in ("auto", "ngram", "suffix")


@dataclass(frozen=True)
class EngineConfig:
    """The settings of one engine on one device.

    `kv_cache_tokens` is the number of tokens whose keys and values the pool should hold; the engine rounds up to
    blocks. `random_weights` loads no weights but fills the shape in `model/config.json` with noise, for benchmarks.
    """

    model: Path  # a local directory
    device: str = "cpu"
    cpu_path: str = "auto"  # one of CPU_PATHS
    dtype: str = "auto"  # one of DTYPES
    quantization: str = "auto"  # one of QUANTIZATIONS
    kv_cache_dtype: str = "auto"  # one of KV_CACHE_DTYPES
    max_model_len: int = 2048
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = BLOCK_SIZE
    kv_cache_tokens: int = 65536
    expected_batch: int | None = None  # rows that usually run side by side; None: max_num_seqs
    random_weights: bool = False
    deterministic: bool = False  # on a GPU too, a row's bits do not depend on the rows beside it
    gpu_memory_utilization: float = 0.9  # the share of a GPU's memory that may be taken
    kv_cache_memory_bytes: int | None = None  # most bytes for keys and values; None: all that is left
    speculation: Speculation = field(default_factory=Speculation)
    prefix_sharing: bool = True  # compute the common start of neighbouring prompts once
    prefix_grain: int = TILE  # positions of the pieces in which it is shared: `blocks_of`
    forced_tokens: bool = True  # take a token without the model where a grammar allows no other; the same rows, sooner
    learned_admission: bool = True  # promise a row the blocks that similar rows took, not all that it may need at most

    @property
    def few_rows(self) -> bool:
        """True if a usual step is small. This chooses the product of 4-bit weights, and so affects results."""
        return self.usual_batch <= FEW_ROWS

    def computed_in(self, stored: str, has_float16: bool) -> str:
        """Return the type that weights of the type `stored` are multiplied in; `has_float16` is about the device."""
        if self.dtype != "auto":
            return self.dtype
        # float32 represents every float16 number.
        return "float32" if stored == "float16" and not has_float16 else stored

    def cached_in(self, computed: str) -> str:
        """Return the type that keys and values are stored in; `computed` is the type that they are computed in.

        The default is `computed`, so that no precision is lost and no step converts.
        """
        return computed if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    def halved(self) -> "EngineConfig":
        """Return this config with half the rows side by side and half the tokens a step, for when memory ran out."""
        tokens = max(LEAST_BATCHED_TOKENS, self.max_num_batched_tokens // 2)
        return replace(self, max_num_seqs=max(1, self.max_num_seqs // 2), max_num_batched_tokens=tokens)

    @property
    def usual_batch(self) -> int:
        """Rows that usually run side by side, which is the number of tokens of a usual step."""
        return self.max_num_seqs if self.expected_batch is None else self.expected_batch


def blocks_of(block_size: int | None, path: str, states: bool) -> tuple[int, int]:
    """Return (`block_size`, `prefix_grain`) of a config: the size that is given, or the one that suits.

    `path` is that of the CPU's kernels, REFERENCE on a GPU too; `states`: the model has layers that keep states.
    Attention in C computes each token by itself, so that any whole block can be shared. Elsewhere tokens of a prompt
    are computed in tiles, and so they are in layers with states.
    """
    size = block_size or (BLOCK_SIZE if path == REFERENCE else BLOCK_SIZE_IN_C)
    return size, TILE if path == REFERENCE or states else size


@dataclass
class EngineStats:
    """Counts of one engine so far. Seconds of steps with prompts and decoding are split in proportion to tokens."""

    steps: int = 0
    prompt_tokens: int = 0  # prompt tokens computed
    completion_tokens: int = 0
    shared_tokens: int = 0  # prompt tokens not computed, because another row shares them
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0  # drafts that verification accepted
    forced: int = 0  # tokens that were the only ones their grammars allowed, and were taken without the model
    replayed_steps: int = 0  # steps on a GPU without prompt tokens: as recorded before,
    recorded_steps: int = 0  # recorded for this one,
    launched_steps: int = 0  # and launched kernel by kernel
    padded_tokens: int = 0  # padding computed beside real tokens
    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    kv_bytes_read: int = 0  # bytes of keys and values that attention read; counted on a GPU only
    kv_bytes_unshared: int = 0  # what it would have read if every sequence had read its prefix itself
    expert_layers: int = 0  # mixtures of experts that steps computed, one for each layer; counted on a CPU only
    experts_touched: int = 0  # experts whose weights they read
    operations: int = 0  # integer and floating-point operations of all matrix products, without padding
    peak_operations_per_second: float = 0.0  # measured on this device with the scheme's product; 4-bit weights expanded
    peak_bytes_per_second: float = 0.0  # measured on this device by copying; read and written bytes both count
    weight_bytes: int = 0
    kv_cache_bytes: int = 0
    peak_memory_bytes: int = 0  # of the engine's process
    peak_device_bytes: int = 0  # of a GPU's memory that the engine took
    running: int = 0  # rows side by side, at this moment
    kv_cache_used: float = 0.0  # share of the KV cache that rows have taken, at this moment
    step_sizes: dict[int, int] = field(default_factory=dict)  # tokens of a step with padding -> number of steps
    kernels: dict[str, str] = field(default_factory=dict)  # operation -> implementation used
    device: str = ""
    notes: list[str] = field(default_factory=list)  # slower paths taken, for the report


_COUNTED = (
    *("steps", "prompt_tokens", "completion_tokens", "padded_tokens", "operations"),
    *("shared_tokens", "preemptions", "drafted", "accepted", "forced", "kv_bytes_read", "kv_bytes_unshared"),
    *("replayed_steps", "recorded_steps", "launched_steps", "expert_layers", "experts_touched"),
    *("load_seconds", "prefill_seconds", "decode_seconds"),
)
_PEAKS = ("peak_memory_bytes", "peak_device_bytes")


def added(before: EngineStats, after: EngineStats) -> EngineStats:
    """Return the counts of two engines that ran one after the other; fields that are no counts come from `after`."""
    sums = {name: getattr(before, name) + getattr(after, name) for name in _COUNTED}
    sizes = dict(Counter(before.step_sizes) + Counter(after.step_sizes))
    peaks = {name: max(getattr(before, name), getattr(after, name)) for name in _PEAKS}
    return replace(after, step_sizes=sizes, **sums, **peaks)
