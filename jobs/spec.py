"""What a job is: every choice of `batchinfer run`, resolved once, frozen; and how a job ends early."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from batchinfer.engine.config import BLOCK_SIZES, LEAST_BATCHED_TOKENS, Speculation
from batchinfer.engine.request import SamplingParams
from batchinfer.errors import UsageError
from batchinfer.formats.scheme import QUANTIZATIONS

MAX_SAMPLES = 128  # of a row, which are in memory together


@dataclass(frozen=True)
class JobSpec:
    """One job. Just one of `prompt_column`, `prompt_template` and `messages_column` is set.

    A `UsageError` names flag, value and bound. Paths are as the user gave them; `model` is a directory or a Hub id.
    """

    inputs: tuple[Path, ...]
    output: Path
    model: str
    revision: str | None = None
    tokenizer: str | None = None  # a directory or a Hub id, where it is not the model's own
    prompt_column: str | None = None
    prompt_template: str | None = None  # "... {column} ..."
    messages_column: str | None = None
    system_prompt: str | None = None  # only with `chat` or `messages_column`
    chat: bool = False  # wrap the plain prompt in the checkpoint's chat template
    allow_special_tokens: bool = False  # plain prompts that were rendered before
    id_column: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1  # samples of a row
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "auto"
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None  # None: what the checkpoint says
    max_num_seqs: int | None = None  # None: by the device
    max_num_batched_tokens: int | None = None
    block_size: int = 32
    csv_delimiter: str | None = None  # between the values of .csv files; None: a comma
    columns: tuple[str, ...] | None = None  # input columns to keep; None: all
    commit_rows: int = 10_000
    commit_seconds: float = 30.0
    max_error_rate: float = 1.0
    overwrite: bool = False
    shard: tuple[int, int] | None = None  # (index from 0, count): only those rows
    step_timeout: float = 600.0  # seconds without a step after which the engine is replaced
    grace: float = 30.0  # seconds from a signal to the job's end
    time_limit: float | None = None  # seconds after which it stops
    resume: bool = True
    retry_errors: bool = False
    incremental: bool = False  # only rows that no earlier run had, into one more file of the output folder
    random_weights: bool = False
    deterministic: bool = False
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None  # for keys and values at most; None: what there is
    prefix_sharing: bool = True  # no flag: benchmarks switch it off, and what follows
    learned_admission: bool = True
    speculation: Speculation = field(default_factory=Speculation)  # its model is a directory or a Hub id, as given
    canary: int = 0  # rows to compare with a reference before the job begins
    canary_reference: str | None = None  # a directory or a Hub id; None: the same model without quantization
    metrics_textfile: Path | None = None  # for node_exporter's textfile collector
    deduplicate: bool = True  # rows that must come out alike are computed once

    @property
    def grows(self) -> bool:
        """Whether the output is a folder that gets one more file; the run of that file is one like any other."""
        return self.incremental and not self.output.suffix

    @property
    def computed_samples(self) -> int:
        """Of a row; without noise they are all the same."""
        return self.n if self.sampling.temperature > 0 else 1

    def __post_init__(self) -> None:
        sources = {
            "--prompt-column": self.prompt_column,
            "--prompt-template": self.prompt_template,
            "--messages-column": self.messages_column,
        }
        given = [flag for flag, value in sources.items() if value is not None]
        if len(given) != 1:
            raise UsageError(f"give one of {', '.join(sources)}; got {' and '.join(given) or 'none'}")
        if not self.inputs:
            raise UsageError("no input; give one file or more")
        _check_suffix(self.output)
        output = os.path.realpath(self.output)
        if any(f"{os.path.realpath(path)}{os.sep}".startswith(f"{output}{os.sep}") for path in self.inputs):
            raise UsageError(f"--output {self.output} is an input too, or holds one; choose another name")
        folders = [path for path in self.inputs if os.path.isdir(path)]
        if any(output.startswith(f"{os.path.realpath(path)}{os.sep}") for path in folders):
            raise UsageError(f"--output {self.output} is in a folder of the input; choose another one")
        if self.columns is not None and not self.columns:
            raise UsageError("--columns is empty; name one input column or more, or leave it out to keep all")
        if self.chat and self.messages_column is not None:
            raise UsageError("--chat wraps a plain prompt; --messages-column has its own roles: leave one out")
        templated = self.chat or self.messages_column is not None
        if self.system_prompt is not None and not templated:
            raise UsageError("--system-prompt needs --chat or --messages-column")
        if self.allow_special_tokens and templated:
            raise UsageError("--allow-special-tokens is for plain prompts: leave out --chat and --messages-column")
        for flag, value, known in (
            ("--device", self.device, ("auto", "cpu", "cuda")),
            ("--dtype", self.dtype, ("auto", "float32", "bfloat16", "float16")),
            ("--quantization", self.quantization, QUANTIZATIONS),
            ("--kv-cache-dtype", self.kv_cache_dtype, ("auto", "float32", "bfloat16", "float16", "int8", "fp8")),
        ):
            if value not in known:
                raise UsageError(f"{flag} is {value!r}; it must be one of {', '.join(known)}")
        if not 1 <= self.n <= MAX_SAMPLES:
            raise UsageError(f"--n is {self.n}; it must be from 1 to {MAX_SAMPLES}")
        _at_least("--seed", self.seed, 0)
        if self.block_size not in BLOCK_SIZES:
            raise UsageError(f"--block-size is {self.block_size}; it must be one of {', '.join(map(str, BLOCK_SIZES))}")
        _at_least("--commit-rows", self.commit_rows, 1)
        _at_least("--canary", self.canary, 0)
        if self.canary_reference is not None and not self.canary:
            raise UsageError("--canary-reference needs --canary N, with the number of rows to compare")
        for flag, number, bound in (
            ("--max-num-seqs", self.max_num_seqs, 1),
            ("--max-num-batched-tokens", self.max_num_batched_tokens, LEAST_BATCHED_TOKENS),
            ("--max-model-len", self.max_model_len, 2),
            ("--kv-cache-memory-bytes", self.kv_cache_memory_bytes, 1),
        ):
            if number is not None:
                _at_least(flag, number, bound)
        if not 0.05 <= self.gpu_memory_utilization <= 1:
            raise UsageError(
                f"--gpu-memory-utilization is {self.gpu_memory_utilization}; it must be a share from 0.05 to 1"
            )
        if not self.commit_seconds > 0:
            raise UsageError(f"--commit-seconds is {self.commit_seconds}; it must be above 0")
        if self.shard is not None and not 0 <= self.shard[0] < self.shard[1]:
            index, count = self.shard
            raise UsageError(
                f"--shard is {index}/{count}; shards are counted from 0: give 0/{count} to {count - 1}/{count}"
            )
        if self.incremental and self.id_column is None:
            raise UsageError("--incremental needs --id-column: by id and content it knows which rows are new")
        against = {"--shard": self.shard is not None, "--overwrite": self.overwrite, "--no-resume": not self.resume}
        for flag, wanted in against.items():
            if self.incremental and wanted:
                raise UsageError(f"--incremental adds to what is there: leave {flag} out")
        if not self.step_timeout > 0:
            raise UsageError(f"--step-timeout is {self.step_timeout}; it must be above 0 seconds")
        if not self.grace > 0:
            raise UsageError(f"--grace is {self.grace}; it must be above 0 seconds")
        if self.time_limit is not None and not self.time_limit > 0:
            raise UsageError(f"--time-limit is {self.time_limit} seconds; it must be above 0")
        if self.metrics_textfile is not None and self.metrics_textfile.suffix != ".prom":
            raise UsageError(f"--metrics-textfile is {self.metrics_textfile}; its name must end in .prom")
        if not 0 <= self.max_error_rate <= 1:
            raise UsageError(f"--max-error-rate is {self.max_error_rate}; it must be from 0 to 1")


def _at_least(flag: str, value: int, bound: int) -> None:
    if value < bound:
        raise UsageError(f"{flag} is {value}; it must be {bound} or more")


def _check_suffix(output: Path) -> None:
    from batchinfer.jobs.results.formats import format_of  # with pyarrow, which --help is faster without

    format_of(output)


def sharded(output: Path, index: int, count: int) -> Path:
    """Where that shard of an output goes: OUT-I-of-N with the same suffix, or the folder OUT-I-of-N."""
    return output.with_name(f"{output.stem}-{index}-of-{count}{output.suffix}")
