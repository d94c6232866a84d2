"""What the engine is told before it loads: resolved once by the job, frozen, picklable, free of torch."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

FEW_ROWS = 4
"""Up to so many rows side by side, weights of 4 bits are best left in 4 bits (benchmarks/four_bit.py).

At 8 rows int4pack still makes new tokens a third faster than expanded weights do; but it computes prompts at less than
half their speed, and from 8 rows on that is more than the gain where a row has as many new tokens as prompt tokens.
"""

LEAST_BATCHED_TOKENS = 64  # a tile of a prompt
BLOCK_SIZES = (8, 16, 32, 64)
LEAST_GPU_SHARE = 0.05  # of a GPU's memory
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}  # of a number in the KV cache
KV_CACHE_DTYPES = ("auto", *KV_CACHE_BYTES)
METHODS = ("off", "auto", "ngram", "suffix", "draft_model")
MOST_DRAFTS = 32


@dataclass(frozen=True)
class Speculation:
    """What `--speculative-config` says, with the names that other engines have for it.

    `ngram` looks for the newest tokens in the row itself, `suffix` also in what earlier rows of the job answered,
    `draft_model` asks a smaller model. `auto` takes of these what pays at each step. Whoever drafts, the output is the
    same. A `ValueError` names field, value and bound.
    """

    method: str = "auto"
    num_speculative_tokens: int = 8  # drafts of a row in one step, at most
    model: Path | None = None  # of the drafts; a local directory
    prompt_lookup_min: int = 2  # tokens that must agree before what followed them is drafted
    prompt_lookup_max: int = 5  # tokens that are compared; more of them are no better evidence
    gate: bool = True  # draft only where it is expected to pay, and as many as do; else always, and all

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
        """Whether drafts may be read from text that is there."""
        return self.method in ("auto", "ngram", "suffix")


@dataclass(frozen=True)
class EngineConfig:
    """One engine on one device.

    `kv_cache_tokens` is how many tokens' keys and values the pool must hold, as the plan counted them: the engine
    rounds up to blocks. `random_weights` fills the shape in `model/config.json` with noise, for benchmarks.
    """

    model: Path  # a local directory
    device: str = "cpu"
    dtype: str = "auto"  # one of DTYPES
    quantization: str = "auto"  # one of QUANTIZATIONS
    kv_cache_dtype: str = "auto"  # one of KV_CACHE_DTYPES
    max_model_len: int = 2048
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 32
    kv_cache_tokens: int = 65536
    expected_batch: int | None = None  # rows side by side; None: max_num_seqs
    random_weights: bool = False
    deterministic: bool = False  # a row's bits depend on nothing but itself on a GPU too
    gpu_memory_utilization: float = 0.9  # the share of a GPU's memory that may be taken
    kv_cache_memory_bytes: int | None = None  # for keys and values at most; None: what there is
    speculation: Speculation = field(default_factory=Speculation)
    prefix_sharing: bool = True  # compute what neighbouring rows begin with once
    learned_admission: bool = True  # promise the blocks that rows like it took, not all that a row may come to take

    @property
    def few_rows(self) -> bool:
        """True if a usual step is small; results depend on it where it chooses the product of 4-bit weights."""
        return self.usual_batch <= FEW_ROWS

    def computed_in(self, stored: str, has_float16: bool) -> str:
        """The type that weights in the type `stored` are multiplied in, by devices that multiply float16 or do not."""
        if self.dtype != "auto":
            return self.dtype
        # A checkpoint in float16 holds nothing that float32 cannot.
        return "float32" if stored == "float16" and not has_float16 else stored

    def cached_in(self, computed: str) -> str:
        """The type of keys and values that are computed in the type `computed`: by default as they are computed, so
        that nothing is lost, and nothing converted at each step."""
        return computed if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    def halved(self) -> "EngineConfig":
        """Half as many rows side by side and half as many tokens a step: for memory that turned out too small."""
        tokens = max(LEAST_BATCHED_TOKENS, self.max_num_batched_tokens // 2)
        return replace(self, max_num_seqs=max(1, self.max_num_seqs // 2), max_num_batched_tokens=tokens)

    @property
    def usual_batch(self) -> int:
        """Tokens of a usual step."""
        return self.max_num_seqs if self.expected_batch is None else self.expected_batch


@dataclass
class EngineStats:
    """What the engine counted so far; seconds of mixed steps are shared out by tokens."""

    steps: int = 0
    prompt_tokens: int = 0  # prompt tokens computed
    completion_tokens: int = 0
    shared_tokens: int = 0  # prompt tokens that another row had computed
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0  # drafts that were right
    padded_tokens: int = 0  # rows computed beside real tokens
    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    operations: int = 0  # integer and floating-point operations of the matrix products asked for
    peak_operations_per_second: float = 0.0  # measured here with the scheme's product, not packed in 4 bits
    weight_bytes: int = 0
    kv_cache_bytes: int = 0
    peak_memory_bytes: int = 0  # of the engine's process
    peak_device_bytes: int = 0  # of a GPU's memory, taken by the engine
    step_sizes: dict[int, int] = field(default_factory=dict)  # tokens of a step, padded -> steps
    kernels: dict[str, str] = field(default_factory=dict)  # op -> path taken
    device: str = ""
    notes: list[str] = field(default_factory=list)  # slower paths taken, for the report


_COUNTED = (
    *("steps", "prompt_tokens", "completion_tokens", "padded_tokens", "operations"),
    *("shared_tokens", "preemptions", "drafted", "accepted"),
    *("load_seconds", "prefill_seconds", "decode_seconds"),
)
_PEAKS = ("peak_memory_bytes", "peak_device_bytes")


def added(before: EngineStats, after: EngineStats) -> EngineStats:
    """What two engines counted, one after the other; what is no count is the later one's."""
    sums = {name: getattr(before, name) + getattr(after, name) for name in _COUNTED}
    sizes = dict(Counter(before.step_sizes) + Counter(after.step_sizes))
    peaks = {name: max(getattr(before, name), getattr(after, name)) for name in _PEAKS}
    return replace(after, step_sizes=sizes, **sums, **peaks)
